"""Two commands that write one folder at once: the first goes on, the second is refused in one line, nothing is lost."""

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import MINI_RECIPE, lines_of, start
from data_examples import amber, jsonl
from scoring_examples import write_benchmarks, write_own_task, write_tokenizer
from series_examples import make_series
from tally import Tally, tallied

from fineline_jax import prepare_pack
from fineline_jax.checkpoints.open import open_series
from fineline_jax.cli import main
from fineline_jax.data.corpora import prepare_amber
from fineline_jax.data.storage import open_data_set
from fineline_jax.scoring.requests import pack

SWEEP = """
from fineline_jax.ablation import Sweep, grid
from fineline_jax.catalogue import load_recipe

def sweep():
    return Sweep("small", load_recipe("mini.py"), grid({"optimizer.schedule.peak": (1e-3, 3e-3)}))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = write_tokenizer(folder / "tokenizer", adds_bos=True)
    benchmarks = write_benchmarks(folder / "benchmarks", documents=4)
    make_series(folder / "series", tokenizer, (1, 2, 3))
    prepare_pack("piqa", tokenizer, folder / "pack", benchmarks=benchmarks)
    (folder / "mini.py").write_text(MINI_RECIPE)
    (folder / "sweep.py").write_text(SWEEP)
    windows = [[(7 * i + j) % 400 for j in range(9)] for i in range(70)]
    lines = amber(folder / "lines.jsonl", windows)
    prepare_amber([lines], folder / "data", vocab_size=512, sequence_length=8, tokenizer=tokenizer)
    jsonl(folder / "text.jsonl", ["the cat runs under the house"] * 30)
    write_own_task(folder)
    (folder / "table.csv").write_text("series,tokens,task,metric,value\na,1,piqa,acc,0.5\na,2,piqa,acc,0.6\n")
    assert main(["score", f"{folder}/series", "--pack", f"{folder}/pack", "--out", f"{folder}/scores"]) == 0
    return folder


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    with tallied("pairs of writers", request) as counts:
        yield counts


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch) -> Path:
    """A working directory with the inputs in it."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def stopped(command: str, at: Path) -> Iterator[int]:
    """Meanwhile a process of the command stands still, from when the file `at` is there; then it ends well."""
    process = start(command.split())
    try:
        while not (at.is_file() and at.stat().st_size):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        yield process.pid
        process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    finally:
        process.kill()
        process.wait()


def assert_refused(command: str, by: int, folder: str, capsys) -> None:
    capsys.readouterr()
    assert main(command.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fineline: {folder}: being written by process {by} on host ")
    assert "; wait for it to end, or choose another " in line


def trained(run: Path) -> bool:
    """Every step has one line, and every kept checkpoint is there."""
    steps = Counter(line["step"] for line in lines_of(run) if "loss" in line)
    kept = [checkpoint.step for checkpoint in open_series(str(run)).checkpoints]
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    return steps == Counter(range(1, 9)) and kept == [0, 2, 4, 6, 8] and folders == ["0", "2", "4", "6", "8"]


def scored(out: Path) -> bool:
    logged = [json.loads(line)["checkpoint"] for line in (out / "log.jsonl").read_text().splitlines()]
    return sorted(logged) == ["step1", "step2", "step3"] and len(list((out / "series").iterdir())) == 3


def compared(out: Path) -> bool:
    """Both runs of the sweep are whole, and the table has both."""
    runs = sorted(path for path in (out / "runs").iterdir())
    return len(runs) == 2 and all(map(trained, runs)) and (out / "summary.csv").read_text().count("\n") == 3


SCORE = "score series --pack pack --out x"
WRITERS: dict[str, tuple[str, str, Callable[[Path], bool], int]] = {
    # command → lock file, what is refused, what must be there, exit status of the same command afterwards
    "pretrain mini.py --run x": (".x.lock", "x", trained, 0),
    "data prepare text text.jsonl --tokenizer tokenizer --sequence-length 8 --out x": (
        ".x.lock", "x", lambda x: open_data_set(x).splits["train"] > 10, 0,
    ),
    "data prepare amber lines.jsonl --sequence-length 8 --vocab-size 512 --out x": (
        ".x.lock", "x", lambda x: open_data_set(x).splits == {"chunk_000": 70}, 0,
    ),
    "tasks prepare piqa --tokenizer tokenizer --benchmarks benchmarks --out x": (
        ".x.lock", "x", lambda x: pack.load(x).hash == pack.load(Path("pack")).hash, 0,
    ),
    SCORE: ("x/.series.lock", "x/series", scored, 0),
    "export-scores scores --out x": (".x.lock", "x", lambda x: len(list(x.glob("*/results_*.json"))) == 3, 0),
    "analyze table.csv --out x": (".x.lock", "x", lambda x: (x / "report.html").stat().st_size > 10_000, 0),
    "export series/step1 x": (".x.lock", "x", lambda x: len(open_series(str(x)).checkpoints) == 1, 2),
    "import series/step1 x": (".x.lock", "x", lambda x: len(open_series(str(x)).checkpoints) == 1, 2),
    "traces scores --relative x": (
        ".x.lock", "x", lambda x: pack.load(x / "pack").hash == pack.load(Path("pack")).hash and scored(x), 2,
    ),
    "ablate sweep.py --out x": ("x/runs/.peak-0.001_seed-0.lock", "x/runs/peak-0.001_seed-0", compared, 0),
}  # fmt: skip


QUICK = [command for command in WRITERS if command.startswith(("pretrain", "data prepare text", "score", "analyze"))]
EACH = [pytest.param(command, marks=[] if command in QUICK else pytest.mark.slow) for command in WRITERS]


@pytest.mark.parametrize("command", EACH)
def test_of_two_commands_that_write_one_folder_the_second_is_refused(command, here, capsys, tally):
    lock, folder, complete, again = WRITERS[command]
    before = {path.name for path in here.iterdir()}
    with tally.one():
        with stopped(command, here / lock) as first:
            assert_refused(command, first, folder, capsys)
        assert complete(here / "x")
        assert main(command.split()) == again
        assert complete(here / "x")
        assert {path.name for path in here.iterdir()} == before | {"x"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["data prepare world --out x", "demo --out x"])
def test_of_two_demos_the_second_is_refused(command, here, capsys, tally):
    process = start(command.split())
    while not (here / ".x.lock").is_file() or not (here / ".x.lock").stat().st_size:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    with tally.one():
        assert_refused(command, process.pid, "x", capsys)
    process.kill()
    process.communicate()


def test_parts_score_at_once_into_one_folder(here, capsys, tally):
    with tally.one(), stopped(f"{SCORE} --part 1/2", here / "x/.series.0-of-2.lock") as first:
        assert main(f"{SCORE} --part 2/2".split()) == 0
        assert [path.name for path in (here / "x/series").iterdir()] == ["step2.parquet"]
        assert_refused(f"{SCORE} --part 1/2", first, "x/series", capsys)
        assert_refused(SCORE, first, "x/series", capsys)
    assert scored(here / "x")


def test_a_run_that_trains_and_scores_is_read_meanwhile(here, capsys, tally):
    score = "score x --pack pack --out"
    with tally.one(), stopped("pretrain mini.py --run x --score pack", here / "x/checkpoints/0/complete.json") as first:
        assert_refused("pretrain mini.py --run x", first, "x", capsys)
        assert_refused(f"{score} x/scores", first, "x/scores/x", capsys)
        assert main(f"{score} other --watch --watch-timeout 0".split()) == 0
        assert main(["export", "x/checkpoints/0", "exported"]) == 0
    assert trained(here / "x")
    names = [f"step{step}.parquet" for step in (0, 2, 4, 6, 8)]
    assert sorted(path.name for path in (here / "x/scores/x").iterdir()) == names
    assert main(f"{score} x/scores".split()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITERS)
def test_two_commands_started_at_once_leave_what_one_leaves(command, here, tally):
    _, _, complete, _ = WRITERS[command]
    before = {path.name for path in here.iterdir()}
    with tally.one():
        both = [start(command.split()) for _ in range(2)]
        said = [process.communicate(timeout=300) for process in both]
        statuses = sorted(process.returncode for process in both)
        assert statuses in ([0, 0], [0, 2]), said  # 0, 0: the second began when the first had ended
        assert complete(here / "x")
        assert {path.name for path in here.iterdir()} == before | {"x"}


@pytest.mark.slow
def test_two_lm_evals_at_once_leave_the_files_of_both(here, tmp_path_factory, tally):
    """lm-eval's files have the microsecond of their run in their names: no lock is needed, none replaces another."""
    command = "lm-eval --model fineline --model_args pretrained=series/step1,dtype=float32 --tasks tiny --include_path"
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("datasets"))}
    with tally.one():
        both = [start(f"{command} tasks --output_path x --log_samples".split(), **own) for _ in range(2)]
        said = [process.communicate(timeout=300) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        results = [json.loads(file.read_text())["results"]["tiny"] for file in (here / "x").rglob("results_*.json")]
        samples = [file.read_text().splitlines() for file in (here / "x").rglob("samples_tiny_*.jsonl")]
        assert len(results) == 2 and results[0] == results[1] and "acc,none" in results[0]
        assert [[json.loads(line)["doc_id"] for line in lines] for lines in samples] == [[0, 1, 2, 3]] * 2
