"""Scores as files in lm-eval's own layout, made by lm-eval's own code from the stored log-likelihoods.

    OUT/<series>__<checkpoint>/results_<time>.json          all metrics of all tasks and groups
    OUT/<series>__<checkpoint>/samples_<task>_<time>.jsonl  one line per document

Source of the layout: lm-eval 0.4.13, `evaluator.py` (`evaluate`, `simple_evaluate`) and
`loggers/evaluation_tracker.py`. The tasks are built without their data sets: the pack holds the documents.
"""

import collections
import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fineline_jax import progress
from fineline_jax.atomic_files import atomic_folder
from fineline_jax.errors import Incomplete, UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.lm_eval_compat import (
    DEFAULT_OTHER_SEED,
    DEFAULT_RANDOM_SEED,
    EvaluationTracker,
    add_env_info,
    bootstrap_by,
    documents_replaced,
    evaluation_results,
)
from fineline_jax.scoring.metrics import bootstrap, guessing
from fineline_jax.scoring.metrics.documents import tables
from fineline_jax.scoring.modes import lm_eval as mode_of_lm_eval
from fineline_jax.scoring.requests import pack as packs
from fineline_jax.scoring.requests.pack import Pack
from fineline_jax.scoring.requests.suite import Suite, TaskSpec
from fineline_jax.scoring.requests.tasks import Group, Task, load_tasks, own_file
from fineline_jax.scoring.score_files import Scores

log = logging.getLogger(__name__)


def export(folder: Path, out: Path, pack: Pack | None = None, *, samples: bool = True) -> list[Path]:
    """Write what lm-eval would have written for every checkpoint scored in `folder`; returns the results files.

    pack: default, the one in `folder`. samples: also a line per document, which repeats the prompt for each choice:
    MMLU with five shots takes 170 MB per checkpoint. A checkpoint that was exported before is replaced.
    Tasks for which lm-eval generates text are left out: of those only gold solutions are scored here.
    Raises UserError if there are no scores of lm-eval's, or tasks that it does not define; Incomplete at the end, if
    checkpoints have log-likelihoods that are not finite, which are left out.
    """
    if folder.resolve() == out.resolve():
        raise UserError(f"--out {out}: is the folder of the scores; give another")
    files, broken = score_files.usable_files(folder)
    pack = pack or packs.load(folder / "pack")
    if (mode := pack.manifest["mode"]) != mode_of_lm_eval.MODE.name:
        raise UserError(f"{folder}: scored in mode {mode}, whose numbers are not lm-eval's; score in mode lm-eval")
    environment: dict[str, Any] = {"git_hash": None}  # of a checkout of lm-eval
    add_env_info(environment)
    written = []
    with (
        _stored_documents(pack) as documents,
        _fast_bootstrap(pack, files),
        progress.bar("export", len(files), "checkpoints") as advance,
    ):
        tasks, groups = definitions(pack)
        facts = _facts(pack)
        for path in files:
            stored = score_files.read(path)
            if stored.header.key.pack_hash != pack.hash:
                raise UserError(f"{path}: made with another request pack; give the right --pack, or score it again")
            results = _results(pack, tasks, groups, documents, stored)
            results |= {
                "config": _config(pack, stored) | {"fineline": facts},
                "date": path.stat().st_mtime,
                **environment,
            }
            results |= {"max_length": stored.header.context}
            written.append(_write(results, stored, out, samples))
            advance(1, stored.header.checkpoint)
    if broken:
        raise Incomplete(
            f"{out}: {len(written)} of {len(written) + len(broken)} checkpoints exported; not those whose"
            f" log-likelihoods are NaN or infinite: {', '.join(broken)}; see their weights"
        )
    return written


def definitions(pack: Pack) -> tuple[list[Task], list[Group]]:
    """lm-eval's tasks and groups of the pack. Raises UserError if the installed lm-eval has others."""
    members = {task for group in pack.manifest["groups"] for task in group["tasks"]}
    nested = [set(group["tasks"]) for group in pack.manifest["groups"]]
    shots = {task["task"]: task["shots"] for task in pack.tasks}
    specs = []
    for group in pack.manifest["groups"]:
        if not any(set(group["tasks"]) < other for other in nested):
            specs.append(TaskSpec(group["group"], shots=shots[group["tasks"][0]]))
    specs += [TaskSpec(name, shots=count) for name, count in shots.items() if name not in members]
    own = [own_file(row["config_sha256"]) for row in pack.tasks]
    include = dict.fromkeys(file.parent for file in own if file is not None)
    tasks, groups = load_tasks(Suite(pack.manifest["suite"], tuple(specs), include_path=tuple(include)))
    order = {name: position for position, name in enumerate(shots)}
    if {task.name for task in tasks} != set(order):
        raise UserError(
            f"the installed lm-eval groups the tasks of suite {pack.manifest['suite']!r} differently;"
            f" install lm-eval {pack.manifest['lm_eval']}"
        )
    exported = [task for task in tasks if task.definition.OUTPUT_TYPE != "generate_until"]
    if left_out := sorted(order.keys() - {task.name for task in exported}):
        log.warning("not exported, since lm-eval generates text for them: %s", ", ".join(left_out))
    if not exported:
        raise UserError(f"suite {pack.manifest['suite']!r} has no task that lm-eval scores by log-likelihood")
    names = {task.name for task in exported}
    groups = [group for group in groups if names & set(group.leaves)]
    return sorted(exported, key=lambda task: order[task.name]), groups


def _results(
    pack: Pack, tasks: list[Task], groups: list[Group], documents: dict[str, "Documents"], stored: Scores
) -> dict[str, Any]:
    """What `lm_eval.evaluate` returns, samples included."""
    accumulated = {}
    contexts = [*pack.contexts["text"].to_pylist(), None]  # row -1: none
    given = [contexts[row] for row in pack.request_context]
    texts = pack.requests["text"].to_pylist()
    scored = list(zip(stored.loglikelihood.tolist(), stored.is_greedy.tolist(), strict=True))
    for task in tasks:
        raw_metrics, logged = collections.defaultdict(list), []
        for number, (doc, row) in enumerate(zip(documents[task.name], documents[task.name].rows, strict=True)):
            requests = range(row["first_request"], row["first_request"] + row["requests"])
            answers = [scored[i] if given[i] is not None else scored[i][0] for i in requests]
            arguments = [(given[i], texts[i]) if given[i] is not None else (texts[i],) for i in requests]
            metrics = task.definition.process_results(doc, answers)
            logged.append({
                "doc_id": number, "doc": doc, "target": row["target"], "arguments": arguments,
                "resps": [[answer] for answer in answers], "filtered_resps": answers, "filter": "none",
                "metrics": list(metrics), **{key: row[key] for key in ("doc_hash", "prompt_hash", "target_hash")},
                **metrics,
            })  # fmt: skip
            for metric, value in metrics.items():
                raw_metrics[metric, "none"].append(value)
        accumulated[task.name] = {"task": task.definition, "raw_metrics": raw_metrics, "logged_samples": logged}
    chosen = {group.name: group.definition for group in groups}
    return evaluation_results(accumulated, chosen, bootstrap.ITERATIONS)


class Documents(list[dict[str, Any]]):
    """The documents of a task, with what lm-eval asks of a data set."""

    def __init__(self, rows: list[dict[str, Any]]):
        super().__init__(json.loads(row["content"]) for row in rows)
        self.rows = rows
        """Of the pack's documents"""

    @property
    def features(self) -> dict[str, Any]:
        return self[0]


@contextlib.contextmanager
def _stored_documents(pack: Pack) -> Iterator[dict[str, Documents]]:
    """Inside, lm-eval's tasks have the documents of the pack, which are processed already, and load no data set."""
    rows: dict[str, list[dict[str, Any]]] = {task["task"]: [] for task in pack.tasks}
    for row in pack.documents.to_pylist():
        rows[row["task"]].append(row)
    stored = {name: Documents(part) for name, part in rows.items()}

    def eval_docs(task: Any) -> Documents:
        name = task.config.task
        if name not in stored:
            raise UserError(f"the pack holds no documents of task {name!r}, which the installed lm-eval groups with it")
        return stored[name]

    with documents_replaced(eval_docs):
        yield stored


@contextlib.contextmanager
def _fast_bootstrap(pack: Pack, files: list[Path]) -> Iterator[None]:
    """Inside, lm-eval's bootstrap is ours, which gives the same; that of perplexity is done for all checkpoints at
    once, before."""
    known: dict[bytes, float] = {}
    for table in tables(pack):
        if table.task["output_type"] == "loglikelihood" and "perplexity" in table.task["lm_eval_metrics"]:
            values = np.stack([score_files.read(path).loglikelihood[table.first] for path in files])
            errors = bootstrap.of_perplexity(values) if len(table.first) > 1 else []
            known |= {row.tobytes(): float(error) for row, error in zip(values, errors)}

    def stderr(kind: str, values: Any, resamples: int) -> float | None:
        if kind == "perplexity":
            row = np.array(values, float)
            error = known.get(row.tobytes())
            return float(bootstrap.of_perplexity(row[None], resamples)[0]) if error is None else error
        resampled = {"f1": bootstrap.of_f1, "mcc": bootstrap.of_mcc}.get(kind)
        return None if resampled is None else float(resampled(np.array(values)[None], resamples)[0])

    with bootstrap_by(stderr):
        yield


def _facts(pack: Pack) -> dict[str, Any]:
    """Of each task and group what the suite and the documents say and lm-eval's results do not: `fineline analyze`
    reads it, so that an export has the verdicts of the scores."""
    guessed = guessing.guesses(pack)
    rows = {row["task"]: row for row in pack.tasks} | {row["group"]: row for row in pack.manifest["groups"]}
    return {
        name: {"domain": row["domain"], "metric": row["metric"]}
        | {"chance": guessed[name].level if name in guessed else row["chance"]}
        | {"chance_from": guessed[name].chooser if name in guessed else ""}
        for name, row in rows.items()
    }


def _config(pack: Pack, stored: Scores) -> dict[str, Any]:
    """As `lm_eval.simple_evaluate` describes the model and the run; `fineline analyze` reads tokens from it."""
    header = stored.header
    arguments: dict[str, Any] = {
        "pretrained": f"{header.series}/{header.checkpoint}",
        "revision": header.checkpoint,
        "dtype": header.key.dtype,
    }
    if header.tokens is not None:
        arguments["tokens"] = header.tokens
    return {
        "model": "fineline",
        "model_args": arguments,
        "model_dtype": header.key.dtype,
        "model_revision": header.checkpoint,
        "model_sha": header.key.weights_hash,
        "batch_size": None,
        "batch_sizes": [],
        "device": None,
        "use_cache": None,
        "limit": pack.manifest["limit"],
        "bootstrap_iters": bootstrap.ITERATIONS,
        "gen_kwargs": None,
        "random_seed": DEFAULT_RANDOM_SEED,
        "numpy_seed": DEFAULT_OTHER_SEED,
        "torch_seed": DEFAULT_OTHER_SEED,
        "fewshot_seed": pack.manifest["fewshot_seed"],
    }


def _write(results: dict[str, Any], stored: Scores, out: Path, samples: bool) -> Path:
    """By lm-eval's tracker, read back: it logs what goes wrong, and goes on."""
    tracker = EvaluationTracker()
    tracker.general_config_tracker.log_experiment_args("fineline", results["config"]["model_args"], None, None, False)
    tracker.general_config_tracker.start_time = time.perf_counter()  # of an evaluation that was run elsewhere
    logged = results.pop("samples")
    folder = out / str(tracker.general_config_tracker.model_name_sanitized)
    with atomic_folder(folder, exclusive=True, replace=True) as partial:
        tracker.output_path = str(partial)
        tracker.save_results_aggregated(results, logged)
        if samples:
            for task, lines in logged.items():
                tracker.save_results_samples(task, lines)
        made = partial / folder.name
        try:
            for path in list(made.iterdir()):
                path.rename(partial / path.name)
            made.rmdir()
            name = f"results_{tracker.date_id}.json"
            whole = json.loads((partial / name).read_bytes())["results"].keys() == results["results"].keys()
            for task, lines in logged.items() if samples else ():
                text = (partial / f"samples_{task}_{tracker.date_id}.jsonl").read_bytes()
                whole = whole and [json.loads(line)["doc_id"] for line in text.splitlines()] == [
                    line["doc_id"] for line in lines
                ]
        except (OSError, ValueError):
            whole = False
        if not whole:
            raise UserError(
                f"{folder}: lm-eval's writer has lost a part of it, most likely for lack of space; make room and run"
                " the same command again"
            )
    return folder / name
