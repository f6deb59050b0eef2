"""A process that scores a series is killed (SIGKILL) at its worst moments, again and again, and loses nothing."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOMENTS = ["the pack half written", "the first file half written", "before it gets its name", "before it is noted",
           "the third in the model", "the log half written", ""]  # fmt: skip
CHECKPOINTS = 5


def test_whatever_is_killed_finished_files_stay_and_none_is_half_there(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parents[2] / "helpers")]),
    }
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *killed, finished, whole = [json.loads(line) for line in done.stdout.splitlines()]
    assert [run["signal"] for run in killed] == [signal.SIGKILL] * len(killed), done.stderr
    assert finished["signal"] == whole["signal"] == 0 and len(killed) == len(MOMENTS) - 1
    seen: dict[str, list] = {}
    for run in killed:
        assert seen.items() <= run["files"].items(), "a finished file was written again"
        seen = run["files"]
        assert all(content == whole["files"][name][1] for name, (_, content) in seen.items()), "a file is not whole"
    assert [len(run["files"]) for run in killed] == [0, 0, 0, 1, 2, 3]
    assert seen.items() <= finished["files"].items()
    assert {name: content for name, (_, content) in finished["files"].items()} == {
        name: content for name, (_, content) in whole["files"].items()
    }
    assert len(whole["files"]) == CHECKPOINTS
    assert finished["beside"] == whole["beside"], "what a kill left half there is gone"
    assert [run["scored"] for run in [*killed, finished]] == [1, 1, 1, 1, 2, 1, 2] and whole["scored"] == CHECKPOINTS


def score(folder: Path, out: Path, moment: str, scored: Path) -> None:
    """Score the run in `folder`, and die at the moment."""
    from played_model import Model
    from scoring_examples import score_series

    from fineline_jax.checkpoints.open import open_series
    from fineline_jax.mesh import make_mesh
    from fineline_jax.recipe import MeshShape
    from fineline_jax.scoring import score_files
    from fineline_jax.scoring.requests import pack
    from fineline_jax.scoring.series import score_series as series_loop

    def die(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(write: Callable) -> Callable:
        """Write the file and then die with half of it."""

        def written(table: Any, file: Path, **options: Any) -> None:
            write(table, file, **options)
            os.truncate(file, file.stat().st_size // 2)
            die()

        return written

    model = Model()

    def make_scorer(*arguments: Any, **options: Any) -> Any:
        score = model.make_scorer(*arguments, **options)
        return functools.partial(count, score)

    def count(score: Any, *arguments: Any, **options: Any) -> Any:
        with scored.open("a") as file:
            file.write("x")
        if moment.endswith("in the model") and len(list(out.glob("run/[!.]*.parquet"))) == 2:
            die()
        return score(*arguments, **options)

    def note(folder: Path, line: dict) -> None:
        with (folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line)[:20])
        die()

    series_loop.make_scorer = make_scorer
    if moment.startswith("the pack"):
        pack.write_files = lambda made, partial: ((partial / "contexts.parquet").write_bytes(b"x"), die())
    elif moment.startswith("the first file"):
        score_files.pq.write_table = half(score_files.pq.write_table)
    elif moment.startswith("before it gets"):
        Path.replace = die
    elif moment.startswith("before it is noted"):
        score_files.note = die
    elif moment.startswith("the log"):
        score_files.note = note
    score_series(open_series(str(folder / "run")), pack.load(folder / "pack"), out, make_mesh(MeshShape()))


def state(out: Path) -> dict[str, Any]:
    files = {
        path.name: [path.stat().st_mtime_ns, path.read_bytes().hex()] for path in sorted(out.glob("run/[!.]*.parquet"))
    }
    return {"files": files, "beside": sorted(path.name for path in out.glob("run/*"))}


def forked(task: Callable[[], None]) -> int:
    """The signal that ended `task` in a process of its own."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed by itself"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def play(folder: Path) -> None:
    """Libraries are imported once; each run is a fork, in which JAX starts anew."""
    import test_loop as loop
    import transformers  # noqa: F401

    from fineline_jax.scoring.engine import scorer  # noqa: F401

    def prepare() -> None:
        import jax

        with jax.set_mesh(loop.one_device()):
            loop.export_hf(loop.CONFIG, loop.fresh_params(1), folder / "run" / "step1")
        for step in range(2, CHECKPOINTS + 1):
            shutil.copytree(folder / "run" / "step1", folder / "run" / f"step{step}")
        loop.pack.save(loop.packed(), folder / "pack")

    assert forked(prepare) == 0
    scored = folder / "scored"
    for out, moment in [*((folder / "out", moment) for moment in MOMENTS), (folder / "whole", "")]:
        scored.write_text("")
        ended = forked(lambda out=out, moment=moment: score(folder, out, moment, scored))
        print(json.dumps({"signal": ended, "scored": len(scored.read_text())} | state(out)), flush=True)


if __name__ == "__main__":
    play(Path(sys.argv[1]))
