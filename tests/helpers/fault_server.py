"""Runs commands of `fineline` under injected faults, each in a fork of a process that has the libraries imported.

Started with faults.c in LD_PRELOAD. Reads lines of JSON, {"arguments", "folder", "error", "at", "once", "only",
"kind"}: run the command in `folder` and look at its result, `folder`/x; without arguments only look. {"load"}: import
what all commands do. Answers a line each.
"""

import contextlib
import ctypes
import hashlib
import importlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

LIBRARIES = (
    *("jax", "flax.nnx", "optax", "orbax.checkpoint", "tensorflow_datasets", "transformers", "lm_eval.evaluator"),
    *("lm_eval.loggers", "plotly.graph_objects", "matplotlib.pyplot", "pandas", "pyarrow.parquet", "tensorboardX"),
    *(
        "fineline_jax.interface",
        "fineline_jax.cli",
        "fineline_jax.training.loop",
        "fineline_jax.scoring.lm_eval.export",
    ),
    *("fineline_jax.scoring.series.score_series", "fineline_jax.checkpoints.convert", "fineline_jax.data.corpora"),
    *("fineline_jax.scoring.requests.build", "fineline_jax.analysis", "fineline_jax.trajectories.report.html_page"),
)


def files(folder: Path) -> list[Path]:
    """Those that are not hidden, nor below a hidden folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def state_of(kind: str, path: Path) -> Any:
    """What a reader of `path` finds, without times; raises whatever the reader raises where it is not whole."""
    if kind == "data":
        from fineline_jax.data.storage import open_data_set

        found = open_data_set(path)
        return {split: sha(found.read(split, range(count)).tobytes()) for split, count in found.splits.items()}
    if kind == "pack":
        from fineline_jax.scoring.requests.pack import load

        return load(path).hash
    if kind == "run":
        from fineline_jax.checkpoints.open import open_series
        from fineline_jax.checkpoints.runs.digest_record import damage
        from fineline_jax.training.metrics import read_metrics

        checkpoints = open_series(str(path)).checkpoints
        wrong = [one.name for one in checkpoints if damage(one.location)]
        events = sum(file.stat().st_size > 0 for file in (path / "tensorboard").glob("events*"))
        steps = [line["step"] for line in read_metrics(path)]
        return [[one.name for one in checkpoints], wrong, steps, events > 0, (path / "tokenizer").is_dir()]
    if kind == "demo":
        parts = {"run": "run", "scores": "scores", "report": "report"}
        return {part: state_of(part, path / name) for part, name in parts.items()}
    if kind == "sweep":
        import pandas

        runs = {run.name: state_of("run", run) for run in sorted((path / "runs").iterdir()) if run.name[0] != "."}
        return [runs, sorted(pandas.read_csv(path / "summary.csv")["series"]), (path / "summary.csv").is_file()]
    if kind == "scores":
        from fineline_jax.scoring import score_files
        from fineline_jax.scoring.requests.pack import load

        scores = {
            file.name: sha(score_files.read(file).loglikelihood.tobytes()) for file in score_files.score_files(path)
        }
        return [load(path / "pack").hash, scores]
    if kind == "report":
        import PIL.Image

        state = {}
        for file in files(path):
            if file.suffix == ".png":
                PIL.Image.open(file).load()
            tail = file.read_bytes().rstrip()[-7:].decode("latin-1") if file.suffix == ".html" else ""
            state[str(file.relative_to(path))] = sha(file.read_bytes()) if file.suffix == ".csv" else tail
        return state
    state = {}
    # lm-eval's layout, of which the last run's files count, and Hugging Face's.
    last = {re.sub(r"_\d{4}-[\d\-T.]+", "", str(file.relative_to(path))): file for file in files(path)}
    for name, file in last.items():
        content = file.read_bytes()
        if file.suffix == ".jsonl":
            state[name] = [json.loads(line)["doc_id"] for line in content.splitlines()]
        elif file.name.startswith("results_"):
            state[name] = json.loads(content)["results"]
        else:
            state[name] = sha(content)
    return state


def command(asked: dict[str, Any], answer: int) -> None:
    """In the child."""
    library = ctypes.CDLL(None)
    os.chdir(asked["folder"])
    library.fault_only(asked["only"].encode())
    library.fault_arm(asked["folder"].encode(), asked["error"], asked["at"], int(asked["once"]))
    from fineline_jax.cli import main

    text, status = io.StringIO(), 99
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(asked["arguments"])
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc(file=text)
    count = library.fault_count()
    library.fault_arm(b"", 0, 0, 0)
    told = {"status": status, "count": count, "said": text.getvalue()[-4000:]} | look(asked)
    os.write(answer, json.dumps(told).encode())


def look(asked: dict[str, Any]) -> dict[str, Any]:
    """{"state": None} where the result is not whole, with the reason."""
    try:
        return {"state": state_of(asked["kind"], Path(asked["folder"], "x"))}
    except Exception as error:
        return {"state": None, "why": f"{type(error).__name__}: {error}"[:300]}


def load() -> None:
    """What commands of models and scores import, for all forks from now on."""
    for name in LIBRARIES:
        importlib.import_module(name)
    from fineline_jax.scoring.lm_eval import export

    export.add_env_info = lambda storage: None  # asks a dozen programs about the machine


def main() -> None:
    importlib.import_module("fineline_jax.data.corpora")
    for line in sys.stdin:
        asked = json.loads(line)
        if "load" in asked:
            load()
            print("{}", flush=True)
            continue
        with tempfile.TemporaryFile() as answer:
            child = os.fork()
            if child == 0:
                logging.getLogger().handlers.clear()
                if asked["arguments"]:
                    command(asked, answer.fileno())
                else:
                    os.write(answer.fileno(), json.dumps(look(asked)).encode())
                os._exit(0)
            _, ended = os.waitpid(child, 0)
            answer.seek(0)
            died = {"status": os.waitstatus_to_exitcode(ended), "count": 0, "said": "it died", "state": None}
            print(answer.read().decode() or json.dumps(died), flush=True)


if __name__ == "__main__":
    main()
