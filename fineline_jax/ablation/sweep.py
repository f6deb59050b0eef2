"""A sweep: a base recipe, arms that change named fields of it, and seeds. Plain values, no JAX."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fineline_jax.ablation.changes import changed
from fineline_jax.catalogue import find_config, made_by
from fineline_jax.errors import UserError
from fineline_jax.recipe import Clock, Recipe
from fineline_jax.text_table import counted

EXPONENTS = {"fixed": 0.0, "square_root": 0.5, "linear": 1.0}
"""Learning-rate rules: the power of the batch ratio by which peak and final rate grow."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared: the base recipe with these fields changed."""

    name: str
    """Letters, digits and `_ . + -`; a part of the names of its run folders."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Dotted names of recipe fields and their values; none: the base itself."""
    step: int | None = None
    """With Sweep.branches: the only checkpoint that it begins at; None: each of them."""
    choice: str = ""
    """Of `crossed`: the arm without its size. The order of choices is compared between the sizes."""


@dataclasses.dataclass(frozen=True)
class Branches:
    """Every run of the sweep begins at a checkpoint of another run."""

    run: str
    """Folder of that run."""
    steps: tuple[int, ...]
    """Its kept checkpoints; every arm begins at each of them."""
    tokens: int
    """Tokens that each branch trains after its checkpoint."""
    optimizer_state: Literal["kept", "fresh"] = "kept"
    """Whether Adam's moments go on, or begin at zero."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    arm: str
    seed: int
    recipe: Recipe
    """Its name is that of the run folder."""
    until: int
    """Tokens consumed at its end, also where its schedule is longer; those before a branch count."""
    parent: tuple[Path, int] | None = None
    """Run and step of the checkpoint that it begins at; None: from scratch."""
    parent_tokens: int = 0
    """Tokens of that checkpoint."""
    optimizer_state: Literal["kept", "fresh"] = "kept"

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def clock(self) -> Clock:
        """Its steps against tokens; those before a branch count."""
        return Clock(self.recipe, self.parent[1] if self.parent else 0, self.parent_tokens)

    @property
    def last_step(self) -> int:
        """The step it ends at: the tokens it is given, rounded down to whole steps."""
        step = self.clock.step_at(self.until)
        return step if self.clock.tokens_at(step) == self.until else step - 1

    @property
    def largest_step(self) -> int:
        """Tokens of the largest step of its batch schedule."""
        return max(self.recipe.batch.sizes) * self.recipe.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps it trains."""
        return self.last_step - self.clock.step

    @property
    def tokens(self) -> int:
        """Tokens it trains in those steps."""
        return self.clock.tokens_at(self.last_step) - self.parent_tokens


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Arms times seeds, times the checkpoints of branches. Checked when it is made; raises UserError."""

    name: str
    """Also its folder below ablations/, if --out names none."""
    base: Recipe
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0,)
    """Each arm is run once with each."""
    seeded: Literal["both", "weights", "data"] = "both"
    """What a seed sets: initial weights and data order, or one of them; the other is the base's in all runs."""
    learning_rate_rule: Literal["fixed", "square_root", "linear"] = "fixed"
    """By which power of (tokens per step of the arm / of the base) peak and final learning rate grow: 0, 1/2 or 1. An
    arm that names optimizer.schedule.peak has that peak. Of a batch schedule the first stage counts."""
    beta2_half_life: int = 0
    """Tokens in which the weight of a squared gradient in Adam's second moment halves: optimizer.beta2 of each arm
    follows from its batch. 0: the recipe's. An arm that names optimizer.beta2 has that."""
    until: int = 0
    """Tokens at which every run ends, though its schedule may be longer; 0: at its recipe's tokens."""
    branches: Branches | None = None
    """Where the runs begin; None: from scratch."""
    keep: Literal["all", "weights", "last"] = "weights"
    """What a finished run keeps: all; the weights of all, and the optimizer state of the last; the last alone."""
    equal_tokens: bool = True
    """Refuse arms of one model size whose trained tokens differ by a whole step or more."""

    def __post_init__(self) -> None:
        where = f"sweep {self.name}"
        for value in (self, self.branches):
            _check_choices(where, value)
        names = [arm.name for arm in self.arms]
        for name in (self.name, *names):
            if not re.fullmatch(r"[\w+-][\w.+-]*", name):
                raise UserError(f"{where}: the name {name!r} is no name of a folder; use letters, digits and _ . + -")
        if not self.arms or not self.seeds:
            raise UserError(f"{where}: has no {'seeds' if self.arms else 'arms'}; name at least one")
        for values, kind in ((names, "arm"), (self.seeds, "seed")):
            if len(set(values)) < len(values):
                twice = next(value for value in values if list(values).count(value) > 1)
                raise UserError(f"{where}: {kind} {twice} is there twice; name each once")
        for arm in self.arms:
            if own := {"seed", "data_seed", "name"} & set(arm.changes):
                raise UserError(f"{where}: arm {arm.name} sets {min(own)}, which the sweep does; leave it out")
        if self.branches is not None and (self.until or not self.branches.steps or self.branches.tokens < 1):
            raise UserError(f"{where}: branches have steps and tokens of their own; give both, and no until")
        if self.until > (longest := max(trial.recipe.tokens for trial in self.trials())):
            raise UserError(f"{where}: until {self.until:,} tokens, but the longest run has {longest:,}; give fewer")
        self._check_tokens(where)

    def trials(self) -> tuple[Trial, ...]:
        """All runs, seed by seed, so that an interrupted sweep has whole comparisons."""
        starts: Sequence[int | None] = (None,) if self.branches is None else self.branches.steps
        return tuple(
            self._trial(arm, seed, start)
            for seed, start, arm in itertools.product(self.seeds, starts, self.arms)
            if arm.step is None or arm.step == start
        )

    def _trial(self, arm: Arm, seed: int, start: int | None) -> Trial:
        recipe = changed(self.base, {**arm.changes, **self._seeds(seed)})
        ratio = recipe.tokens_per_step / self.base.tokens_per_step
        rules = {}
        if "optimizer.schedule.peak" not in arm.changes:
            factor = ratio ** EXPONENTS[self.learning_rate_rule]
            schedule = recipe.optimizer.schedule
            rules |= {f"optimizer.schedule.{field}": getattr(schedule, field) * factor for field in ("peak", "final")}
        if self.beta2_half_life and "optimizer.beta2" not in arm.changes:
            rules["optimizer.beta2"] = 0.5 ** (recipe.tokens_per_step / self.beta2_half_life)
        begins = "" if start is None else f"_step-{start}"
        recipe = changed(recipe, rules | {"name": f"{arm.name}{begins}_seed-{seed}"})
        if self.branches is None or start is None:
            return Trial(arm.name, seed, recipe, min(self.until or recipe.tokens, recipe.tokens))
        run, of = Path(self.branches.run).expanduser(), self.branches
        before = tokens_of_checkpoint(run, start)
        return Trial(arm.name, seed, recipe, before + of.tokens, (run, start), before, of.optimizer_state)

    def _seeds(self, seed: int) -> dict[str, int | None]:
        match self.seeded:
            case "both":
                return {"seed": seed, "data_seed": None}
            case "weights":
                return {"seed": seed, "data_seed": self.base.order_seed}
            case "data":
                return {"data_seed": seed}

    def _check_tokens(self, where: str) -> None:
        groups: dict[Any, list[Trial]] = {}
        for trial in self.trials():
            if trial.steps < 1:
                raise UserError(f"{where}: {trial.name} has no whole step of {trial.recipe.tokens_per_step} tokens")
            groups.setdefault((trial.recipe.model, trial.parent), []).append(trial)
        for trials in groups.values() if self.equal_tokens else ():
            least, most = min(trials, key=lambda one: one.tokens), max(trials, key=lambda one: one.tokens)
            if most.tokens - least.tokens >= max(one.largest_step for one in trials):
                raise UserError(
                    f"{where}: {least.name} trains {least.tokens:,} tokens and {most.name} {most.tokens:,}; give all"
                    " arms the same tokens, or set equal_tokens=False"
                )


def _check_choices(where: str, value: Sweep | Branches | None) -> None:
    """Raise UserError for a field that is none of the words it can be."""
    for field in dataclasses.fields(value) if value is not None else ():
        words = get_args(field.type) if get_origin(field.type) is Literal else ()
        if words and (given := getattr(value, field.name)) not in words:
            raise UserError(f"{where}: {field.name}={given!r}: give one of {', '.join(words)}")


def rounding(trials: Sequence[Trial]) -> list[str]:
    """The runs whose tokens are no whole number of steps, in a sentence; nothing where there are none."""
    rounded = {trial.arm: trial for trial in trials if trial.parent_tokens + trial.tokens != trial.until}
    if not rounded:
        return []
    most = max(rounded.values(), key=lambda one: one.until - one.parent_tokens - one.tokens)
    left = most.until - most.parent_tokens - most.tokens
    return [f"{counted(len(rounded), 'arm')} rounded down to whole steps: at most {left:,} tokens less ({most.arm})."]


def load_sweep(sweep: Sweep | str, until: int | None = None) -> Sweep:
    """A sweep, or that of a name in configs/sweeps, or of a Python file with a function `sweep()`. Raises UserError.

    until: tokens at which every run ends, in place of its own.
    """
    if not isinstance(sweep, Sweep):
        sweep = _of_file(sweep)
    if until is None:
        return sweep
    if until < 1:
        raise UserError(f"--until {until}: give the tokens at which every run ends")
    return dataclasses.replace(sweep, until=until)


def _of_file(name: str) -> Sweep:
    path = Path(name).expanduser()
    if path.suffix != ".py":
        path = find_config(name, "sweeps/{}.py", "sweep")
    elif not path.is_file():
        raise UserError(f"{path}: not there; give a sweep's name or its file")
    return made_by(path, "sweep", Sweep)


def tokens_of_checkpoint(run: Path, step: int) -> int:
    """Tokens consumed at a kept checkpoint of a run. Raises UserError where there is none."""
    from fineline_jax.checkpoints.runs.digest_record import read_record

    record = read_record(run / "checkpoints" / str(step))
    if record is None or record["tokens"] is None:
        raise UserError(f"{run}: has no checkpoint of step {step}; branch from one that is in its folder checkpoints/")
    return record["tokens"]


def grid(axes: Mapping[str, Iterable[Any] | Mapping[str, Any]]) -> tuple[Arm, ...]:
    """An arm for each combination of values: {"batch.sequences": (8, 16), "optimizer.schedule.peak": (1e-3, 3e-3)}.

    Arms are called by the last part of each field's name and the value: sequences-8_peak-0.001. Values that make no
    name, such as tuples, are given as {name: value}.
    """
    last = [field.rpartition(".")[2] for field in axes]
    labels = [name if last.count(name) == 1 else field for name, field in zip(last, axes, strict=True)]
    choices = [
        values.items() if isinstance(values, Mapping) else [(_written(value), value) for value in values]
        for values in axes.values()
    ]
    return tuple(
        Arm(
            "_".join(f"{label}-{name}" for label, (name, _) in zip(labels, chosen, strict=True)),
            {field: value for field, (_, value) in zip(axes, chosen, strict=True)},
        )
        for chosen in itertools.product(*choices)
    )


def ladder(base: Recipe, sizes: Mapping[str, Mapping[str, Any]], *, tokens_per_parameter: float = 0) -> tuple[Arm, ...]:
    """An arm for each model size: {"4M": {"model.width": 128, "model.layers": 6}, …}.

    tokens_per_parameter: trained tokens of each as a multiple of its parameters (Hoffmann et al. 2203.15556: 20), and
    its warmup in proportion; 0: the base's tokens.
    """
    arms = []
    for name, changes in sizes.items():
        resized = changed(base, changes)
        more = {}
        if tokens_per_parameter:
            tokens = round(tokens_per_parameter * resized.model.parameters)
            warmup = round(base.optimizer.schedule.warmup_tokens * tokens / base.tokens)
            more = {"tokens": tokens, "optimizer.schedule.warmup_tokens": warmup}
        arms.append(Arm(name, {**changes, **more}))
    return tuple(arms)


def crossed(sizes: Iterable[Arm], choices: Iterable[Arm]) -> tuple[Arm, ...]:
    """Every choice (of `grid`) at every size (of `ladder`); where both change a field, that of the choice counts."""
    return tuple(
        Arm(f"{size.name}_{choice.name}", {**size.changes, **choice.changes}, choice=choice.name)
        for size, choice in itertools.product(sizes, choices)
    )


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
