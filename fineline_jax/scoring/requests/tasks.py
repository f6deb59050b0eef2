"""lm-eval's tasks, with documents from a local folder, the Hugging Face hub or TFDS.

Prompts, few-shot sampling and targets are lm-eval's own code. What is done here: find a task's definition without
reading all fourteen thousand of them each time, hand it documents, and turn what it builds into plain values.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pyarrow.parquet

from fineline_jax.atomic_files import write_atomic
from fineline_jax.checkpoints.remote.cache import default_downloads
from fineline_jax.errors import UserError, near
from fineline_jax.scoring import lm_eval_compat
from fineline_jax.scoring.lm_eval_compat import Entry, Kind, TaskIndex, TaskManager
from fineline_jax.scoring.requests import gold_solutions
from fineline_jax.scoring.requests.definitions import check_columns, check_config, check_group
from fineline_jax.scoring.requests.suite import Suite, TaskSpec, defined_in
from fineline_jax.scoring.requests.texts import text_entries
from fineline_jax.world.catalogue import TASKS_FOLDER

FEWSHOT_SEED = 1234
"""lm-eval's default; one generator per task, drawn document after document."""
SCOREABLE = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
"""Output types of lm-eval. Of the last kind the gold solutions are scored (`gold_solutions`)."""
LoadDataset = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A leaf task, ready to build requests."""

    name: str
    spec: TaskSpec
    """Of the suite's entry it came from, which may be a group."""
    definition: Any
    """lm-eval's task object."""
    own_file: Path | None = None
    """That defines it, where it is neither lm-eval's nor this package's."""


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of tasks that lm-eval aggregates."""

    name: str
    domain: str
    chance: float | None
    leaves: tuple[str, ...]
    metrics: tuple[tuple[str, bool], ...]
    """(metric, weighted by the number of documents)"""
    definition: Any = None
    """lm-eval's group object."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One question: its requests and what the metrics need to know."""

    doc: dict[str, Any]
    requests: tuple[tuple[str, str], ...]
    """(context, continuation); ("", text) for loglikelihood_rolling; each gold solution for generate_until."""
    gold: tuple[int, ...]
    """Right choices; -100 where the label names no choice, as in lm-eval."""
    choices: tuple[str, ...]
    """Texts whose lengths normalise the choices, without the delimiter."""
    target: str
    words: int
    """Weight of word_perplexity, 0 unless loglikelihood_rolling."""
    bytes: int
    """Weight of byte_perplexity, 0 unless loglikelihood_rolling."""
    number: int = 0
    """Of the document in its task."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """How prompts are worded for a chat model, as lm-eval does it."""

    template: Callable[..., str] | None = None
    """Messages, as {role, content}, -> text; None: prompts are plain text."""
    multiturn: bool = False
    """Solved examples are turns of their own."""
    system_instruction: str | None = None


def load_tasks(
    suite: Suite, source: LoadDataset | None = None, shots: int | None = None, seed: int = FEWSHOT_SEED
) -> tuple[list[Task], list[Group]]:
    """The leaf tasks of `suite` in order, and the groups among its entries.

    `source` replaces `datasets.load_dataset` (see `local_folder`); None: the hub. shots: of all tasks, except those
    that are fixed to none; None: those of the suite. seed: of the draws of solved examples. Raises UserError for an
    unknown task, fixed shots, or missing documents.
    """
    for folder in suite.include_path:
        if not folder.is_dir():
            raise UserError(f"--include-path {folder}: no such folder; give one of lm-eval's task files")
    _refuse_namesakes(suite)
    with lm_eval_compat.without_warnings():
        manager = TaskManager(include_defaults=False, include_path=[str(TASKS_FOLDER), *map(str, suite.include_path)])
    index = lm_eval_compat.task_index(manager)
    for folder in suite.texts:
        index.update(text_entries(folder))
    if suite.include_path or any(spec.task not in index for spec in suite.tasks):
        own = dict(index)
        index.update(_lm_eval_index())
        index.update(own)

    def own_file(name: str) -> Path | None:  # a task that its group defines is called group::task
        entry = index.get(name) or index.get(name.partition("::")[0])
        file = entry.yaml_path if entry else None
        return file if file and any(file.is_relative_to(folder) for folder in suite.include_path) else None

    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    for spec in suite.tasks:
        if spec.task not in index:
            hint = near(spec.task, index, most=3) or "; see `fineline lm-eval ls tasks`"
            raise UserError(f"suite {suite.name!r}: no task or group is called {spec.task!r}{hint}")
        loaded = _load_one(manager, spec, source, shots, seed, own_file)
        for name, definition in loaded["tasks"].items():
            if name in tasks:
                raise UserError(
                    f"suite {suite.name!r}: task {name!r} is in {tasks[name].spec.task!r} and {spec.task!r}"
                )
            tasks[name] = Task(name, spec, definition, own_file(name))
        for name, group in loaded.get("groups", {}).items():
            leaves = tuple(task.task_name for task in group.get_all_tasks())
            metrics = lm_eval_compat.aggregated_metrics(group)
            if file := own_file(name):
                check_group(name, file, [metric for metric, _ in metrics], group.get_all_tasks())
            groups[name] = Group(name, spec.domain, spec.chance, leaves, metrics, group)
    return list(tasks.values()), list(groups.values())


def _refuse_namesakes(suite: Suite) -> None:
    """Raise UserError where two files of one's own define a task that is asked for: lm-eval takes either."""
    found: dict[str, Path] = {}
    for path in sorted({file for folder in suite.include_path for file in folder.rglob("*.yaml")}):
        text = path.read_text(errors="replace")
        name = defined_in(path) if any(spec.task in text for spec in suite.tasks) else ""
        if name in found and any(spec.task == name for spec in suite.tasks):
            raise UserError(f"task {name!r} is defined in {found[name]} and in {path}; rename it in one of them")
        found[name] = path


def definition_file(name: str, config_sha256: str = "") -> Path | None:
    """The YAML file that defines a leaf task, with this hash in a pack; None if there is none."""
    if (file := own_file(config_sha256)) is not None:
        return file
    own = TaskIndex.build([TASKS_FOLDER])
    entry = own.get(name) or _lm_eval_index().get(name)
    return entry.yaml_path if entry else None


def own_file(config_sha256: str) -> Path | None:
    """The file of a task of one's own, if this user has built a pack with it on this machine.

    A pack does not name it: a task file is a program, and the pack may be a stranger's.
    """
    if not re.fullmatch("[0-9a-f]{64}", config_sha256):
        return None
    try:
        return Path(_memory(config_sha256).read_text(encoding="utf-8"))
    except OSError:
        return None


def remember_file(task: Task) -> None:
    """Note where a task of one's own is defined, for its metrics and for `fineline export-scores`."""
    if task.own_file is not None:
        with contextlib.suppress(OSError):  # a read-only home: they say what is missing
            file = _memory(config_hash(task))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, str(task.own_file.absolute()))


def _memory(config_sha256: str) -> Path:
    return default_downloads() / "own_tasks" / config_sha256


def documents(
    task: Task, limit: float | None = None, picked: Collection[int] | None = None, chat: Chat = Chat()
) -> Iterator[Document]:
    """The documents of `task` in order, at most `limit` (below 1: that share); the same loop as lm-eval's
    `Task.build_all_requests` at world size 1. picked: numbers of those that are kept, with the prompts that all would
    have. Drawing few-shot examples has state: load the tasks anew for a second pass."""
    _remember_shots(task.definition)
    _check_pool(task)
    if limit is not None:  # as lm-eval's `get_sample_size`
        limit = math.ceil(len(task.definition.eval_docs) * limit) if limit < 1 else int(limit)
    for doc_id, doc in task.definition.doc_iterator(rank=0, limit=limit, world_size=1):
        with _task_errors(task.name, task.definition.config, f"document {doc_id} of", task.own_file):
            document = _document(task, doc_id, doc, chat)
        if picked is None or doc_id in picked:
            yield dataclasses.replace(document, number=doc_id)


def _document(task: Task, doc_id: int, doc: dict[str, Any], chat: Chat) -> Document:
    definition = task.definition
    output_type = definition.OUTPUT_TYPE
    prefix = lm_eval_compat.generation_prefix(definition, doc)
    context = definition.fewshot_context(
        doc,
        num_fewshot=definition.config.num_fewshot or 0,
        system_instruction=chat.system_instruction,
        apply_chat_template=chat.template is not None,
        fewshot_as_multiturn=chat.multiturn,
        chat_template=chat.template,
        gen_prefix=prefix,
    )
    target = str(definition.doc_to_target(doc))
    if output_type == "generate_until":
        solutions = gold_solutions.continuations(task.name, definition, doc, prefix)
        after_turn = chat.template is not None and not prefix  # no delimiter, as between a turn and a choice
        requests = tuple((context, solution if after_turn else text) for text, solution in solutions)
        return Document(doc, requests, (0,), tuple(solution for _, solution in solutions), target, 0, 0)
    arguments = lm_eval_compat.request_arguments(definition, doc, doc_id, context, chat=chat.template is not None)
    if any(len(one) != (1 if output_type == "loglikelihood_rolling" else 2) for one in arguments):
        raise UserError(f"task {task.name!r} asks about images or sound, which a language model cannot score; drop it")
    requests = tuple(("", one[0]) if len(one) == 1 else (one[0], str(one[1])) for one in arguments)
    if output_type == "multiple_choice":
        choices = tuple(lm_eval_compat.choices(definition, doc))
        return Document(doc, requests, _gold(definition, doc, choices), choices, target, 0, 0)
    if output_type == "loglikelihood":
        return Document(doc, requests, (0,), (requests[0][1].lstrip(),), target, 0, 0)
    words, size = lm_eval_compat.words_and_bytes(definition, doc)
    return Document(doc, requests, (0,), (requests[0][1],), target, words, size)


def shots(task: Task) -> int:
    return task.definition.config.num_fewshot or 0


def config_hash(task: Task) -> str:
    """sha256 of the task's definition, functions by their source, without the file it was read from."""
    config = task.definition.dump_config()
    config["metadata"] = {k: v for k, v in config.get("metadata", {}).items() if k != "config_source"}
    text = json.dumps(config, sort_keys=True, default=_source)
    text = re.sub(r" at 0x[0-9a-f]+", "", text)  # of a function that is wrapped, as in xcopa
    return hashlib.sha256(text.encode()).hexdigest()


def local_folder(benchmarks: Path) -> LoadDataset:
    """A `datasets.load_dataset` that reads BENCHMARKS/<id, / written __>/<config>/<split>.parquet.

    Data sets made of files that a task names itself (`data_files`) are left to the original.
    """
    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
        if options.get("data_files"):
            return original(path, name, split=split, **options)
        folder = benchmarks / path.replace("/", "__")
        # "default" is the hub's word for a data set without configurations
        folder = folder / name if name and (name != "default" or (folder / name).is_dir()) else folder
        files = sorted(folder.glob("*.parquet"))
        if not files:
            raise UserError(
                f"{folder}: no <split>.parquet here, but data set {path!r}{_config(name)} is needed; add it, or leave "
                "--benchmarks out to read it from the hub"
            )
        splits = Splits({file.stem: _read_split(str(file.absolute())) for file in files})
        splits.folder = folder
        return splits if split is None else splits[split]

    return load_dataset


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets`: one for each split that a task processes."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


class Splits(datasets.DatasetDict):
    """Splits of a folder; asking for a missing one is an error that names its file."""

    folder: Path

    def __getitem__(self, split: Any) -> Any:
        if split not in self:
            raise UserError(
                f"{self.folder / str(split)}.parquet: this split is needed and missing; add it, or leave --benchmarks "
                "out to read it from the hub"
            )
        return super().__getitem__(split)


@functools.lru_cache(maxsize=8)
def _read_split(file: str) -> datasets.Dataset:
    """In memory, past the cache of `datasets`: the features come from the schema that Hugging Face writes along."""
    # Given a fingerprint, `datasets` does not pickle and hash all of it, which takes longer than reading it.
    return datasets.Dataset(pyarrow.parquet.read_table(file), fingerprint=hashlib.sha256(file.encode()).hexdigest())


def _load_one(
    manager: TaskManager,
    spec: TaskSpec,
    source: LoadDataset | None,
    shots: int | None,
    seed: int,
    own: Callable[[str], Path | None],
) -> Any:
    """As `lm_eval.simple_evaluate` loads: construct, then set shots and seed. own: the file of a task, if it is the
    user's."""
    asked = own(spec.task)
    with lm_eval_compat.without_warnings(), gold_solutions.without_checkers(), _task_errors(spec.task, own=asked):
        loaded = lm_eval_compat.load(
            manager,
            spec.task,
            source,
            lambda config: check_config(config, own(config.get("task", "")), asked),
            lambda task: check_columns(task, own(task.config.task)),
        )
    for name, definition in loaded["tasks"].items():
        if definition.OUTPUT_TYPE not in SCOREABLE:
            raise UserError(f"task {name!r} is of output_type {definition.OUTPUT_TYPE}, which is not scored; drop it")
        fixed, wanted = definition.get_config("num_fewshot"), spec.shots if shots is None else shots
        if fixed == 0 and wanted and shots is None:
            raise UserError(f"task {name!r} is fixed to 0 shots by its definition; set shots: 0 for it")
        definition.set_config(key="num_fewshot", value=fixed or 0 if wanted is None or fixed == 0 else wanted)
        definition.set_fewshot_seed(seed=seed)
    return loaded


@contextlib.contextmanager
def _task_errors(task: str, config: Any = None, subject: str = "its", own: Path | None = None) -> Iterator[None]:
    """Turn what a task's templates and functions raise on unsuitable documents into a UserError of one line."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise error if "task '" in text else UserError(f"task {task!r}: {text}") from None
    except Exception as error:  # of jinja2, of the hub, of the task's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        reason = "; ".join([reason, *getattr(error, "__notes__", ())])
        # lm-eval's config is an empty dict to `if`
        data_set = "" if config is None else f" {config.dataset_path!r}{_config(config.dataset_name)}"
        remedy = "give documents with the columns of the hub's copy, by --benchmarks or a connection to the hub"
        if isinstance(error, ImportError):
            remedy = "install what it needs, or drop the task"
        elif type(error) is FileNotFoundError:  # the hub's are of a kind of their own
            remedy = "correct its data_files, which are read from the working directory"
        elif own is not None:
            remedy = f"correct {own}, or the data that it names"
        what = "it" if own and config is None else f"{subject} data set{data_set}"
        raise UserError(f"task {task!r}: lm-eval cannot use {what} ({reason}); {remedy}") from error


def _check_pool(task: Task) -> None:
    """Raise UserError if there are fewer solved examples than are to be shown."""
    wanted, sampler = shots(task), getattr(task.definition, "sampler", None)
    if wanted and sampler is not None and len(sampler.df or ()) < wanted:
        raise UserError(
            f"task {task.name!r}: {wanted} shots, but its data set has {len(sampler.df or ())} solved examples; ask for"
            " fewer or give all of them"
        )


def _remember_shots(definition: Any) -> None:
    """Render the parts of each solved example once, not once per document it is shown to."""
    shown = {id(doc) for doc in definition.sampler.df} if getattr(definition, "sampler", None) else set()
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        original = getattr(definition, name)
        rendered: dict[tuple[int, bool], Any] = {}

        def render(doc: Any, own: Any = None, *, original: Any = original, rendered: dict = rendered) -> Any:
            if id(doc) not in shown:
                return original(doc, own)
            key = (id(doc), own is None)  # `own`: the rule for solved examples alone, one per task
            if key not in rendered:
                rendered[key] = original(doc, own)
            return rendered[key]

        setattr(definition, name, render)


def _gold(definition: Any, doc: dict[str, Any], choices: tuple[str, ...]) -> tuple[int, ...]:
    gold = lm_eval_compat.right_answer(definition, doc)
    if isinstance(gold, list):
        return tuple(i if i < len(choices) else -100 for i in gold)
    if isinstance(gold, str):
        return (choices.index(gold) if gold in choices else -100,)
    return (int(gold) if gold < len(choices) else -100,)


def _lm_eval_index() -> dict[str, Entry]:
    """Name -> definition of all of lm-eval's tasks, groups and tags.

    Reading them all takes seconds, so the result is kept in the user's cache folder, keyed by version and path.
    """
    root = lm_eval_compat.tasks_folder()
    key = hashlib.sha256(f"{lm_eval.__version__} {root} {root.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    folder = default_downloads()
    file = folder / f"lm_eval_tasks_{key}.json"
    try:
        rows = json.loads(file.read_text())
    except (OSError, ValueError):
        with lm_eval_compat.without_warnings():
            index = TaskIndex.build([root])
        rows = [_row(entry, root) for entry in index.values()]
        with contextlib.suppress(OSError):  # a read-only home only costs the seconds again
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(rows))
    return {
        name: Entry(name, Kind[kind], root / path if path else None, tags=set(tags)) for name, kind, path, tags in rows
    }


def _row(entry: Entry, root: Path) -> tuple[str, str, str | None, list[str]]:
    path = str(entry.yaml_path.relative_to(root)) if entry.yaml_path else None
    return entry.name, entry.kind.name, path, sorted(entry.tags)


def _config(name: str | None) -> str:
    return f", config {name!r}," if name else ""


def _source(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__name__)
