"""The frozen values that define a run. A run is a pure function of its history, the recipes and the
steps from which each counts (`checkpoints/runs/history.py`), and the step.

Tokens are the clock: warmup, decay, checkpoints and lengths are given in tokens, steps are derived.
A recipe is checked when it is made, each part by its own `check`; an error names the field. It is written into the
run folder as JSON and can be read back from there. No JAX here.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fineline_jax.atomic_files import local_folder
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig

Require = Callable[[bool, str], None]
"""`require(condition, message)` raises UserError with the message, behind the name of the recipe, unless it holds."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One prepared data set (`fineline data prepare`) and its share of the mixture."""

    path: str
    """Folder of the prepared data set, or its address in a bucket (gs://…, s3://…), from which it is staged."""
    weight: float = 1.0
    """Share of the mixture relative to the other sources."""

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer that the data set was prepared with; absent for token lines without one."""
        return local_folder(self.path) / "tokenizer"


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read, and in which order."""

    sources: tuple[Source, ...]
    """Prepared data sets that a run reads, at least one."""
    sequence_length: int = 2048
    """Tokens the model is fed per window; a stored window has one more."""
    order: Literal["shuffle", "chunks"] = "shuffle"
    """shuffle: one permutation per epoch over everything. chunks: the data set's splits
    chunk_000, chunk_001, ... in order, shuffled inside, the last incomplete batch of each dropped (Amber)."""
    mask_documents_at: int | None = None
    """Id of the token that ends every document (EOS): attention stays within a document. None: it crosses them."""

    def check(self, require: Require) -> None:
        require(bool(self.sources), "data.sources is empty; name at least one prepared data set")
        require(all(source.weight > 0 for source in self.sources), "data.sources: every weight must be positive")
        require(
            self.order == "shuffle" or len(self.sources) == 1,
            "data.order='chunks' takes exactly one of data.sources; use order='shuffle' for a mixture",
        )
        require(self.sequence_length >= 1, "data.sequence_length must be at least 1")


@dataclasses.dataclass(frozen=True)
class Batch:
    """How many windows one optimizer step sees."""

    sequences: int
    """Windows per optimizer step, over all devices."""
    accumulation: int = 1
    """Micro-batches per step; the gradient equals that of the whole batch."""
    schedule: tuple[tuple[int, int], ...] = ()
    """(tokens, sequences), ascending in tokens: the windows per step from the first step on that has so many tokens
    behind it."""
    learning_rate_rule: Literal["fixed", "square_root", "linear"] = "fixed"
    """What the schedule of batches multiplies the learning rate by: 1, the square root of the ratio of windows per step
    to batch.sequences, or that ratio."""

    def check(self, require: Require) -> None:
        require(self.accumulation >= 1, "batch.accumulation must be at least 1")
        fields = ["batch.sequences", *(f"batch.schedule.{number}.1" for number in range(len(self.schedule)))]
        for field, sequences in zip(fields, self.sizes, strict=True):
            require(sequences >= 1, f"{field} must be at least 1")
            require(
                sequences % self.accumulation == 0,
                f"{field}={sequences} must be a multiple of batch.accumulation={self.accumulation}",
            )
        borders = [0, *(tokens for tokens, _ in self.schedule)]
        require(
            all(before < after for before, after in itertools.pairwise(borders)),
            "batch.schedule: its tokens must be positive and ascend",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Windows per step of each stage, the first `sequences`."""
        return self.sequences, *(sequences for _, sequences in self.schedule)

    def sequences_at(self, tokens: int) -> int:
        """Windows of the update behind `tokens` trained tokens."""
        return self.sizes[bisect.bisect_right(self.schedule, tokens, key=lambda stage: stage[0])]

    def rate_factor(self, tokens: int) -> float:
        """What the learning rate of that update is multiplied by."""
        exponent = {"fixed": 0.0, "square_root": 0.5, "linear": 1.0}[self.learning_rate_rule]
        return (self.sequences_at(tokens) / self.sequences) ** exponent


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate against tokens: a linear warmup, then the named decay."""

    peak: float = 3e-4
    """Learning rate at the end of the warmup."""
    final: float = 3e-5
    """Learning rate at the end."""
    warmup_tokens: int = 0
    """Tokens of the linear warmup from 0 to the peak."""
    kind: Literal["cosine", "linear", "constant", "wsd", "multistep"] = "cosine"
    """Decay after the warmup: half a cosine, a line, none, a line over the last tokens only (wsd), or in steps."""
    decay_tokens: int = 0
    """wsd: tokens of the linear decay at the end."""
    milestones: tuple[tuple[float, float], ...] = ((0.8, 0.316), (0.9, 0.1))
    """multistep: (share of all tokens, factor of the peak from there on). Default: DeepSeek LLM (2401.02954)."""

    def check(self, require: Require) -> None:
        require(self.peak > 0, "optimizer.schedule.peak must be positive")
        require(0 <= self.final <= self.peak, "optimizer.schedule.final must lie between 0 and the peak")
        shares = [share for share, _ in self.milestones]
        require(
            shares == sorted(shares) and all(0 < share < 1 for share in shares),
            "optimizer.schedule.milestones must have ascending shares between 0 and 1",
        )
        require(
            all(factor >= 0 for _, factor in self.milestones),
            "optimizer.schedule.milestones must not have negative factors",
        )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with global-norm clipping; float32 moments and master weights."""

    schedule: Schedule
    beta1: float = 0.9
    """Factor per step of the running mean of the gradient."""
    beta2: float = 0.95
    """Decay per step of the running mean of the squared gradient."""
    eps: float = 1e-8
    """Added to the root of the second moment before dividing by it."""
    weight_decay: float = 0.1
    """A step subtracts this times the learning rate times the weight."""
    decay: Literal["all", "matrices"] = "all"
    """all: every parameter, norms and embeddings too (Amber, OpenLLaMA). matrices: not the norm scales and biases."""
    clip_norm: float = 1.0
    """Global norm to which larger gradients are scaled down."""
    skip_nonfinite: bool = False
    """Leave weights and moments alone at a step whose loss or gradient is not finite; counted in the metrics."""
    skip_spike_sigmas: float = 0.0
    """Also skip when the loss or gradient norm exceeds its running mean by that many standard deviations; 0: off."""

    def check(self, require: Require) -> None:
        self.schedule.check(require)
        require(0 <= self.beta1 < 1, "optimizer.beta1 must lie in [0, 1)")
        require(0 <= self.beta2 < 1, "optimizer.beta2 must lie in [0, 1)")
        require(self.eps > 0, "optimizer.eps must be positive")
        require(self.weight_decay >= 0, "optimizer.weight_decay must not be negative")
        require(self.clip_norm > 0, "optimizer.clip_norm must be positive")
        require(self.skip_spike_sigmas >= 0, "optimizer.skip_spike_sigmas must not be negative")


@dataclasses.dataclass(frozen=True)
class Loss:
    """Next-token cross-entropy."""

    ignore_token: int | None = None
    """Targets with this id are not trained on (OpenLLaMA: BOS, id 1)."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser."""
    load_balance: float = 0.0
    """model.experts: weight of the load-balancing loss (2101.03961; OLMoE: 0.01), of each micro-batch."""
    router_z_loss: float = 0.0
    """model.experts: weight of the router's squared log-normaliser (2202.08906; OLMoE: 0.001)."""
    chunk_tokens: int = 1024
    """Tokens of a device whose logits exist at a time."""

    def check(self, require: Require) -> None:
        for field in ("z_loss", "load_balance", "router_z_loss"):
            require(getattr(self, field) >= 0, f"loss.{field} must not be negative")
        require(self.chunk_tokens >= 1, "loss.chunk_tokens must be at least 1")


@dataclasses.dataclass(frozen=True)
class Every:
    """A checkpoint at each multiple of `tokens`, until `until` tokens (None: to the end)."""

    tokens: int
    """Distance between kept checkpoints, in tokens."""
    until: int | None = None
    """Tokens at which the rule ends."""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Which states stay for ever, and how often the newest is saved for resume."""

    initial: bool = True
    """Keep the state before the first step."""
    at_tokens: tuple[int, ...] = ()
    """Keep the first state with at least that many tokens, each."""
    every: tuple[Every, ...] = ()
    """Rules in order; each starts where the one before ends."""
    latest_every_tokens: int = 0
    """Distance of the rolling checkpoint that resume starts from; 0: kept ones only."""
    keep: Literal["state", "float32", "bfloat16"] = "state"
    """What a kept checkpoint holds. state: weights and moments, 12 bytes per parameter, from which a run resumes or
    branches. float32, bfloat16: the weights alone, 4 or 2 bytes; the last checkpoint and the rolling one hold all."""
    state_every: int = 0
    """keep=float32 or bfloat16: every n-th kept checkpoint holds the state, for branches; 0: none but the last."""

    def check(self, require: Require) -> None:
        require(self.state_every >= 0, "checkpoints.state_every must not be negative")
        require(
            self.keep == "state" or self.latest_every_tokens > 0 or self.state_every > 0,
            f"checkpoints.keep={self.keep} leaves nothing to resume from; set checkpoints.latest_every_tokens",
        )
        require(all(tokens >= 0 for tokens in self.at_tokens), "checkpoints.at_tokens must not be negative")
        require(self.latest_every_tokens >= 0, "checkpoints.latest_every_tokens must not be negative")
        start = 0
        for rule in self.every:
            require(rule.tokens >= 1, "checkpoints.every: tokens must be at least 1")
            require(start is not None, "checkpoints.every: a rule without until must be the last")
            require(rule.until is None or rule.until > (start or 0), "checkpoints.every: the until values must ascend")
            start = rule.until


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices per axis. One of them may be -1: what is left."""

    replica: int = 1
    """Whole copies of the parameters (plain data parallel)."""
    fsdp: int = -1
    """Shards of parameters and batch (ZeRO-3)."""
    tensor: int = 1
    """Shards of heads and hidden features."""

    def check(self, require: Require) -> None:
        axes = (self.replica, self.fsdp, self.tensor)
        require(all(size >= 1 or size == -1 for size in axes), "mesh: every axis is at least 1, or -1")
        require(axes.count(-1) <= 1, "mesh: at most one axis may be -1")


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the step is computed. Nothing here changes what is learned beyond rounding."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Activations and the weights they meet; masters stay float32."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """auto: splash on TPU, cudnn on CUDA in bfloat16, else xla."""
    remat: Literal["none", "context", "qkv_context", "full", "offload"] = "full"
    """What the backward pass finds saved. none: everything. context: attention outputs. qkv_context: and
    q, k, v. full: layer inputs only. offload: layer inputs, q, k, v and context in host memory."""
    scan_layers: bool = True
    """Compile one layer and loop over it; off: unroll (slower to compile, often faster on GPU)."""
    micro_gradient_norm: bool = False
    """Also log the gradient norm of micro-batches (batch.accumulation above 1), for the gradient-noise scale."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """Windows that are not trained on, the same ones whatever the batch and the mesh."""

    name: str = "held_out"
    """Their mean loss is called validation_loss/NAME."""
    path: str | None = None
    """Folder of a prepared data set; None: all of data.sources that have the split, by their weights."""
    split: str = "validation"
    """Its split; a set without a path is left out where no source has it."""
    windows: int = 64
    """How many: the first of the split in stored order, all where it has fewer; 0: none."""


@dataclasses.dataclass(frozen=True)
class Logging:
    """What a run writes beside its checkpoints."""

    every_steps: int = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write the metrics for TensorBoard too, into RUN/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the `wandb` extra."""
    profile_start_step: int = 0
    """First step of the jax.profiler trace in RUN/profile, from 0."""
    profile_steps: int = 0
    """Steps of the trace; 0: none."""
    validation: tuple[Validation, ...] = (Validation(),)
    """Sets of windows whose loss is measured at every kept checkpoint, each a curve of its own."""
    peak_tflops: float = 0.0
    """Peak TFLOP/s of one device for the MFU; 0: from the device's name where known."""

    def check(self, require: Require) -> None:
        require(self.every_steps >= 1, "logging.every_steps must be at least 1")
        for field in ("profile_start_step", "profile_steps", "peak_tflops"):
            require(getattr(self, field) >= 0, f"logging.{field} must not be negative")
        names = [validation.name for validation in self.validation]
        for position, validation in enumerate(self.validation):
            field = f"logging.validation.{position}"
            require(validation.windows >= 0, f"{field}.windows must not be negative")
            require(
                re.fullmatch(r"[\w.-]+", validation.name) is not None,
                f"{field}.name={validation.name!r} must be letters, digits, '_', '.' and '-'",
            )
            require(names.index(validation.name) == position, f"{field}.name={validation.name!r} is used twice")
        require(self.wandb_project != "", "logging.wandb_project is empty; name a project, or leave it out")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything a run depends on."""

    name: str
    """Name of the run; also of its folder below runs/, if --run names none."""
    model: ModelConfig
    data: Data
    batch: Batch
    optimizer: Optimizer
    tokens: int
    """Trained positions in all; rounded down to whole steps."""
    checkpoints: Checkpoints = Checkpoints()
    loss: Loss = Loss()
    mesh: MeshShape = MeshShape()
    compute: Compute = Compute()
    logging: Logging = Logging()
    seed: int = 0
    """Seeds the initial weights, and the data order where data_seed does not."""
    data_seed: int | None = None
    """Seeds the data order; None: as seed."""

    def __post_init__(self) -> None:
        """Raise UserError naming the first field whose value cannot be."""

        def require(condition: bool, message: str) -> None:
            if not condition:
                raise UserError(f"recipe {self.name}: {message}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
                wrong = f"{field.name} is a {type(value).__name__}; give a {field.type.__name__}, by {field.name}=…"
                require(isinstance(value, field.type), wrong)
        require(bool(self.name), "name is empty; give the run a name")
        for field, seed in (("seed", self.seed), ("data_seed", self.order_seed)):
            require(0 <= seed < 2**32, f"{field}={seed} must lie between 0 and 2**32 - 1")
        for part in (self.data, self.batch, self.optimizer, self.loss, self.checkpoints, self.mesh, self.logging):
            part.check(require)
        self._check_together(require)
        for field, value in _flat(dataclasses.asdict(self)).items():
            require(not isinstance(value, float) or math.isfinite(value), f"{field}={value} is not a finite number")

    def _check_together(self, require: Require) -> None:
        """What holds between the parts of a recipe."""
        model, schedule, length = self.model, self.optimizer.schedule, self.data.sequence_length
        require(length <= model.context, f"data.sequence_length={length} is longer than model.context={model.context}")
        require(
            self.tokens >= self.tokens_per_step,
            f"tokens={self.tokens} is less than one step of {self.tokens_per_step} tokens",
        )
        border = self.batch.schedule[-1][0] if self.batch.schedule else 0
        require(border < self.tokens, f"batch.schedule: {border} tokens are not before the end, tokens={self.tokens}")
        require(
            0 <= schedule.warmup_tokens <= self.tokens,
            f"optimizer.schedule.warmup_tokens={schedule.warmup_tokens} must lie between 0 and tokens={self.tokens}",
        )
        require(
            schedule.kind != "wsd" or 0 < schedule.decay_tokens <= self.tokens - schedule.warmup_tokens,
            "optimizer.schedule.decay_tokens must be positive and fit behind the warmup for kind='wsd'",
        )
        require(
            not self.compute.micro_gradient_norm or self.batch.accumulation > 1,
            "compute.micro_gradient_norm compares micro-batches with steps; set batch.accumulation above 1",
        )
        ignored, size = self.loss.ignore_token, model.vocab_size
        require(
            ignored is None or 0 <= ignored < size,
            f"loss.ignore_token={ignored} is no id of model.vocab_size={size}; leave it out to train on all",
        )
        end = self.data.mask_documents_at
        require(
            end is None or 0 <= end < size,
            f"data.mask_documents_at={end} is no id of model.vocab_size={size}; give that of the end of a document",
        )
        require(
            end is None or model.mixer == "attention",
            f"data.mask_documents_at={end} masks attention, and the state of model.mixer={model.mixer!r} crosses"
            " documents; leave it out",
        )
        for field in ("load_balance", "router_z_loss"):
            weight = getattr(self.loss, field)
            require(not weight or model.experts > 0, f"loss.{field}={weight} is a loss of experts; set model.experts")
        for axis, size in (("heads", model.heads), ("kv_heads", model.kv_heads), ("mlp_width", model.mlp_width)):
            require(
                size % max(self.mesh.tensor, 1) == 0,
                f"model.{axis}={size} is not a multiple of mesh.tensor={self.mesh.tensor}",
            )
        require(
            not self.logging.profile_steps or self.logging.profile_start_step < self.steps,
            f"logging.profile_start_step={self.logging.profile_start_step} is behind the last of {self.steps} steps",
        )

    @property
    def order_seed(self) -> int:
        """What seeds the data order."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def tokens_per_step(self) -> int:
        """Of a batch of batch.sequences; batch.schedule changes it (`Clock`)."""
        return self.batch.sequences * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Steps of a run from scratch."""
        return Clock(self).last_step

    def kept_steps(self) -> tuple[int, ...]:
        """Steps whose state stays for ever, of a run from scratch: as `Clock.kept_steps`."""
        return Clock(self).kept_steps()


@dataclasses.dataclass(frozen=True)
class Clock:
    """Steps against tokens where a recipe begins at a step with that many tokens behind it: a changed recipe goes on
    from the tokens that were trained before it."""

    recipe: Recipe
    step: int = 0
    tokens: int = 0

    @functools.cached_property
    def pieces(self) -> tuple[tuple[int, int, int], ...]:
        """(step, tokens, sequences), ascending: from that step on, with those tokens behind it, batches have so many
        windows."""
        batch, length = self.recipe.batch, self.recipe.data.sequence_length
        step, tokens = self.step, self.tokens
        found = [(step, tokens, batch.sequences_at(tokens))]
        for border, _ in batch.schedule:
            if border > tokens:
                steps = -(-(border - tokens) // (found[-1][2] * length))
                step, tokens = step + steps, tokens + steps * found[-1][2] * length
                found.append((step, tokens, batch.sequences_at(tokens)))
        return tuple(found)

    def sequences_at(self, step: int) -> int:
        """Windows of the update behind `step` steps."""
        return self._piece(0, step)[2]

    def tokens_at(self, step: int) -> int:
        """Tokens behind `step` steps."""
        first, tokens, sequences = self._piece(0, step)
        return tokens + (step - first) * sequences * self.recipe.data.sequence_length

    def step_at(self, tokens: int) -> int:
        """The first step with at least that many tokens behind it."""
        first, begun, sequences = self._piece(1, tokens)
        return first - -(tokens - begun) // (sequences * self.recipe.data.sequence_length)

    @functools.cached_property
    def last_step(self) -> int:
        """The last step: the recipe's tokens are rounded down to it."""
        step = self.step_at(self.recipe.tokens)
        return max(self.step, step if self.tokens_at(step) == self.recipe.tokens else step - 1)

    def kept_steps(self) -> tuple[int, ...]:
        """Steps from `step` on whose state stays for ever, ascending; the last step is always one.

        A milestone of t tokens is the first step with at least t tokens.
        """
        rules, end = self.recipe.checkpoints, self.recipe.tokens
        milestones, start = list(rules.at_tokens), 0
        for rule in rules.every:
            stop = end if rule.until is None else min(rule.until, end)
            milestones += [k * rule.tokens for k in range(start // rule.tokens + 1, stop // rule.tokens + 1)]
            start = stop
        kept = {self.step_at(tokens) for tokens in milestones if tokens >= self.tokens}
        kept |= {self.last_step} | ({0} if rules.initial else set())
        return tuple(sorted(step for step in kept if self.step <= step <= self.last_step))

    def weights_only_steps(self) -> tuple[int, ...]:
        """The kept steps whose checkpoint holds weights alone; the n-th is counted from the first behind `step`."""
        rules = self.recipe.checkpoints
        kept = self.kept_steps()[:-1] if rules.keep != "state" else ()
        first = sum(step == self.step for step in kept)
        whole = kept[first + rules.state_every - 1 :: rules.state_every] if rules.state_every else ()
        return tuple(step for step in kept if step not in whole)

    def is_rolling(self, step: int) -> bool:
        """Whether `step` is the first with some multiple of checkpoints.latest_every_tokens behind it."""
        every = self.recipe.checkpoints.latest_every_tokens
        return every > 0 and step > self.step and self.tokens_at(step) // every > self.tokens_at(step - 1) // every

    def _piece(self, key: int, value: int) -> tuple[int, int, int]:
        """The piece that a step (key 0) or a number of tokens (key 1) is in; the first for what is before it."""
        return self.pieces[max(0, bisect.bisect_right(self.pieces, value, key=lambda piece: piece[key]) - 1)]


def to_json(recipe: Recipe) -> str:
    """The resolved recipe as indented JSON, every field present."""
    return json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"


def from_json(path: Path) -> Recipe:
    """The recipe in a JSON file that `to_json` wrote; absent fields take their defaults.

    Raises UserError naming the file and the field.
    """
    import pydantic

    try:
        text = path.read_bytes()
        recipe = pydantic.TypeAdapter(Recipe).validate_json(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a recipe's JSON file") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if field:
            raise UserError(f"{path}: {field}: {first['msg']}; fix the field") from error
        raise UserError(
            f"{path}: {first['msg']}; fix the file, or delete it where it is a run's: `fineline pretrain` with the"
            " run's recipe writes it again"
        ) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    unknown = _flat(json.loads(text)).keys() - _flat(json.loads(to_json(recipe))).keys()
    if unknown:
        raise UserError(f"{path}: unknown field {min(unknown)}; remove it or fix its name")
    return recipe


def differences(old: Recipe | ModelConfig, new: Recipe | ModelConfig) -> list[str]:
    """One line per field that differs, of two recipes or two models: `path: old -> new`."""
    before, after = fields(old), fields(new)
    keys = list(dict.fromkeys([*before, *after]))
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)]


def fields(recipe: Recipe | ModelConfig) -> dict[str, Any]:
    """The value of every field by its dotted name, as `fineline pretrain` has options."""
    return _flat(dataclasses.asdict(recipe))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"data": {"sources": [{"path": "x"}]}} -> {"data.sources.0.path": "x"}."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {
        key: leaf
        for name, item in items
        for key, leaf in _flat(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }
