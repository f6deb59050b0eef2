"""Suites: which tasks are scored, with how many shots, and how they are grouped into domains."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml

from fineline_jax.catalogue import config_files, config_names, find_config
from fineline_jax.errors import UserError
from fineline_jax.facts.tasks import chance_of, task_of
from fineline_jax.scoring.modes.names import DEFAULT_MODE, check_mode

_PATTERN = "suites/{}.yaml"
_YAML = (".yaml", ".yml")
LANGUAGE_MODELLING = "language modelling"
"""Domain of texts that are scored as a whole."""


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """One task (or group of tasks, such as `mmlu`) of lm-eval and how it is to be read.

    Domain, metric and chance that are not given are those of `facts.tasks`, where it knows the task.
    """

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    task: pydantic.StrictStr
    """Name in lm-eval or of one of this package's own tasks; in a suite also a task file or a folder of texts."""
    domain: pydantic.StrictStr = ""
    """The ability this task counts towards."""
    shots: Annotated[int, pydantic.Field(strict=True, ge=0)] | None = None
    """Solved examples in the prompt; None: what the task's own definition says."""
    metric: pydantic.StrictStr | None = None
    """The metric reported first, e.g. acc_norm; None: acc for multiple choice."""
    chance: Annotated[float, pydantic.Field(strict=True, ge=0, le=1)] | None = None
    """Value of `metric` reached by guessing; None: the mean of 1 / number of choices."""

    def __post_init__(self) -> None:
        fact = task_of(self.task)
        metric = self.metric or fact.metric
        chance = chance_of(self.task, metric or "acc") if self.chance is None else self.chance
        object.__setattr__(self, "domain", self.domain or fact.domain)
        object.__setattr__(self, "metric", metric)
        object.__setattr__(self, "chance", None if math.isnan(chance) else chance)


@dataclasses.dataclass(frozen=True)
class Suite:
    """An ordered set of tasks."""

    name: str
    tasks: tuple[TaskSpec, ...]
    mode: str = DEFAULT_MODE
    """How its requests are encoded and compared (`modes.names`)."""
    include_path: tuple[Path, ...] = ()
    """Folders of task files of one's own; their names come before lm-eval's."""
    texts: tuple[Path, ...] = ()
    """Folders of texts by domain; each is a group of tasks that is called as the folder (`requests.texts`)."""

    def __post_init__(self) -> None:
        check_mode(self.mode, f"suite {self.name!r}")
        if not self.tasks:
            raise UserError(f"suite {self.name!r} has no tasks; list at least one under `tasks:`")
        seen: set[str] = set()
        for spec in self.tasks:
            if spec.task in seen:
                raise UserError(f"suite {self.name!r} lists task {spec.task!r} twice; keep one")
            seen.add(spec.task)


def open_suite(text: "str | Path | Suite") -> Suite:
    """The suite in a YAML file, of that name (the shipped ones, then ./configs/suites), or of those tasks.

    Tasks are separated by commas and may carry their shots: `piqa,arc_challenge@25`. A task is a name, a task file of
    lm-eval (`my_task.yaml`), whose folder is included, or a folder of texts by domain, with a slash (`corpora/`). What
    a task's entry says is taken from the first shipped suite that lists it. Raises UserError for a file that does not
    parse.
    """
    if isinstance(text, Suite):
        return text
    text = str(text)
    if text.endswith(_YAML) and ("," not in text or Path(text).is_file()) and not defined_in(Path(text)):
        return read_suite(Path(text))
    if text in config_names(_PATTERN):
        return read_suite(find_config(text, _PATTERN, "suite"))
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(
            "the suite is empty; give a YAML file, the name of a suite, or task names such as piqa,arc_easy"
        )
    known: dict[str, TaskSpec] = {}
    for suite in shipped_suites():
        if suite.mode == DEFAULT_MODE:  # the metrics of other modes have other names
            known = {spec.task: spec for spec in suite.tasks} | known
    found = Suite("custom", tuple(_from_name(name, known) for name in names))
    found = _with_places(found, Path())
    one = found.tasks[0].task + text[text.find("@") :] * ("@" in text)
    return dataclasses.replace(found, name=one if len(names) == 1 else "custom")


def _with_places(suite: Suite, base: Path) -> Suite:
    """The suite with its task files and folders of texts, relative to `base`, as names and where to find them."""
    specs, include, texts = [], list(suite.include_path), []
    for spec in suite.tasks:
        path = base / spec.task
        if spec.task.endswith(_YAML):
            if not (name := defined_in(path)):
                raise UserError(f"{path}: defines no task of lm-eval; give a file with the key `task` or `group`")
            include.append(path.parent)
            spec = dataclasses.replace(TaskSpec(name), **_given(spec))
        elif "/" in spec.task:
            texts.append(path)
            spec = dataclasses.replace(TaskSpec(path.resolve().name, LANGUAGE_MODELLING), **_given(spec))
        specs.append(spec)
    return dataclasses.replace(
        suite, tasks=tuple(specs), include_path=tuple(dict.fromkeys(include)), texts=tuple(texts)
    )


def _given(spec: TaskSpec) -> dict[str, Any]:
    """What an entry says of its task beside the name."""
    plain = TaskSpec("")
    return {key: value for key, value in vars(spec).items() if key != "task" and value != getattr(plain, key)}


def defined_in(path: Path) -> str:
    """The task or group that a task file of lm-eval defines; "" where it is none, such as a suite. Nothing is run."""
    try:
        root = yaml.compose(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return ""
    keys = {key.value: value.value for key, value in root.value} if isinstance(root, yaml.MappingNode) else {}
    name = "" if "tasks" in keys else keys.get("group", keys.get("task", ""))
    return name if isinstance(name, str) else ""


def read_suite(path: Path) -> Suite:
    """The suite written in the YAML file `path`."""
    try:
        value = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such suite file; give one, or the name of a suite") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error.reason}); give a suite in YAML") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        file = _SuiteFile.model_validate(value)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {_reason(value, error.errors()[0])}") from None
    include = () if file.include_path is None else (path.parent / file.include_path,)
    try:
        suite = Suite(path.stem if file.name is None else file.name, file.tasks, file.mode, include)
        return _with_places(suite, path.parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def shipped_suites() -> Iterator[Suite]:
    """The shipped suites, then those of ./configs that have other names."""
    for path in config_files(_PATTERN).values():
        yield read_suite(path)


def _from_name(text: str, known: dict[str, TaskSpec]) -> TaskSpec:
    name, at, shots = text.partition("@")
    if at and not shots.isdigit():
        raise UserError(f"suite: {text!r} should read task@shots, for example arc_challenge@25")
    spec = known.get(name, TaskSpec(name))
    if name in known and not at:
        return spec
    return dataclasses.replace(spec, shots=int(shots) if at else None)


def _entry(value: Any) -> Any:
    return {"task": value} if isinstance(value, str) else value


class _SuiteFile(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: Annotated[str, pydantic.BeforeValidator(str)] | None = None
    mode: Annotated[str, pydantic.BeforeValidator(str)] = DEFAULT_MODE
    include_path: Annotated[str, pydantic.BeforeValidator(str)] | None = None
    tasks: tuple[Annotated[TaskSpec, pydantic.BeforeValidator(_entry)], ...]


_KEYS = [field.name for field in dataclasses.fields(TaskSpec)]


def _reason(value: Any, error: Any) -> str:
    """The first of pydantic's errors in a line that names the key and what it may be."""
    if len(error["loc"]) < 2:
        if error["type"] in ("extra_forbidden", "invalid_key"):
            return f"a suite has no key {error['loc'][0]!r}; known: {', '.join(_SuiteFile.model_fields)}"
        return f"a suite needs the keys `name` and `tasks`, a list of {{{', '.join(_KEYS)}}}"
    entry, key = _entry(value["tasks"][error["loc"][1]]), error["loc"][-1]
    if not isinstance(entry, dict) or not isinstance(entry.get("task"), str):
        return f"every entry of `tasks` needs a `task`, got {entry!r}"
    if key not in _KEYS:
        return f"task {entry['task']!r} has the unknown key {key!r}; known: {', '.join(_KEYS)}"
    if error["type"] in ("greater_than_equal", "less_than_equal"):
        return f"task {entry['task']!r}: {key}={entry[key]!r}; shots must be at least 0 and chance between 0 and 1"
    return f"task {entry['task']!r}: {key}={entry[key]!r} has the wrong type"
