"""Every change of a file that a command makes fails in turn: no room (ENOSPC), a broken disk (EIO), a disk that became
read-only (EROFS); or the process is killed there (SIGKILL). Exit status 0 means that everything is there and reads
back; otherwise one line says what was wrong, what was there before is intact, and the same command without the fault
gives the right result.

faults.c does it to the whole process (LD_PRELOAD), also to what Orbax, Arrow, ArrayRecord, TensorBoard, lm-eval write.
"""

import collections
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import MINI_RECIPE
from data_examples import amber, jsonl
from scoring_examples import write_benchmarks, write_own_task, write_tokenizer
from series_examples import make_series

from fineline_jax import prepare_pack
from fineline_jax.data.corpora import prepare_amber
from fineline_jax.text_table import text_table

HELPERS = Path(__file__).parents[1] / "helpers"
FAULTS = {
    "ENOSPC": (errno.ENOSPC, False),
    "EIO once": (errno.EIO, True),
    "EROFS": (errno.EROFS, False),
    "SIGKILL": (-1, True),
}
COMMANDS = {
    "data prepare text": ("data", "data prepare text text.jsonl --tokenizer tokenizer --sequence-length 8 --out x"),
    "data prepare amber": ("data", "data prepare amber lines.jsonl --vocab-size 512 --sequence-length 8 --out x"),
    "tasks prepare": ("pack", "tasks prepare piqa --tokenizer tokenizer --benchmarks benchmarks --out x"),
    "pretrain": ("run", "pretrain mini.py --run x"),
    "score": ("scores", "score series --pack pack --out x"),
    "analyze": ("report", "analyze scores --tokens-per-step 1000 --out x"),
    "export": ("files", "export series/step1 x"),
    "import": ("run", "import series/step1 x"),
    "export-scores": ("files", "export-scores scores --out x"),
    "lm-eval": (
        "files",
        "lm-eval --model fineline --model_args pretrained=series/step1,dtype=float32 --tasks tiny --include_path tasks"
        " --output_path x --log_samples",
    ),
    "traces --relative": ("scores", "traces scores --relative x"),
    "data prepare world": ("data", "data prepare world --out x"),
    "ablate": ("sweep", "ablate sweep.py --out x"),
    "demo": ("demo", "demo --out x --tokens 104448"),
}
"""What `fault_server.state_of` reads of the result, and the command."""
LIBRARIES = {
    "TFDS: ArrayRecord": ("data prepare text", "array_record"),
    "TFDS: metadata": ("data prepare amber", "dataset_info.json"),
    "TensorBoard": ("pretrain", "tfevents"),
    "Orbax and TensorStore": ("pretrain", "opt_state"),
    "safetensors": ("export", ".safetensors"),
    "Arrow": ("score", ".parquet"),
    "pandas": ("analyze", "tidy.parquet"),
    "plotly": ("analyze", "report.html"),
    "matplotlib: PNG": ("analyze", ".png"),
    "matplotlib: SVG": ("analyze", ".svg"),
    "lm-eval's tracker, ours": ("export-scores", "samples_"),
    "lm-eval's tracker": ("lm-eval", "results_"),
}
"""Who writes files for us: a command that has it do so, and a word in the files' paths. kaleido has no part in any."""
REPLACES = ("tasks prepare", "analyze", "export-scores")
"""Commands that run again over a result; it is there when the fault comes."""
LONG = {"data prepare world": 8, "ablate": 8, "demo": 3}
"""Places of the commands that take long, where no number is asked for."""
SWEEP = """
import importlib.util
from fineline_jax.ablation import Sweep, grid

def sweep():
    found = importlib.util.spec_from_file_location("mini", "mini.py")
    mini = importlib.util.module_from_spec(found)
    found.loader.exec_module(mini)
    return Sweep("small", mini.recipe(), grid({"optimizer.schedule.peak": (1e-3, 3e-3)}))
"""
RECIPE = MINI_RECIPE.replace("tensorboard=False", "tensorboard=True").replace("Every(64)", "Every(128)")


@pytest.fixture(scope="module")
def ask(tmp_path_factory) -> Iterator[Callable[..., dict[str, Any]]]:
    """Run a command of the server, in its folder of inputs."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux to inject faults")
    folder = tmp_path_factory.mktemp("faults")
    library = folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HELPERS / "faults.c", "-ldl"], check=True)
    inputs = folder / "inputs"
    inputs.mkdir()
    tokenizer = write_tokenizer(inputs / "tokenizer", adds_bos=True)
    jsonl(inputs / "text.jsonl", ["the cat runs under the house"] * 30)
    lines = amber(inputs / "lines.jsonl", [[(7 * i + j) % 400 for j in range(9)] for i in range(70)])
    prepare_amber([lines], inputs / "data", vocab_size=512, sequence_length=8, tokenizer=tokenizer)
    (inputs / "mini.py").write_text(RECIPE)
    environment = os.environ | {"LD_PRELOAD": str(library), "XLA_FLAGS": "", "COLUMNS": "200"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    with (folder / "log").open("w") as log, subprocess.Popen(
        [sys.executable, HELPERS / "fault_server.py"], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
    ) as server:  # fmt: skip
        assert server.stdin and server.stdout

        def ask(**asked: Any) -> dict[str, Any]:
            assert server.stdin and server.stdout
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            assert answer, (folder / "log").read_text()[-3000:]
            return json.loads(answer)

        ask.inputs = inputs
        ask.folder = folder
        yield ask
        server.kill()


def run(
    ask: Any,
    command: str,
    folder: Path,
    kind: str = "",
    error: int = 0,
    at: int = 0,
    once: bool = False,
    only: str = "",
) -> dict[str, Any]:
    return ask(arguments=command.split(), folder=str(folder), kind=kind, error=error, at=at, once=once, only=only)


def make_scores(ask: Any) -> None:
    """What the commands read that have to do with models, once."""
    if (ask.inputs / "pack").exists():
        return
    ask(load=True)
    tokenizer, benchmarks = ask.inputs / "tokenizer", write_benchmarks(ask.inputs / "benchmarks", documents=4)
    prepare_pack("piqa", tokenizer, ask.inputs / "pack", benchmarks=benchmarks)
    make_series(ask.inputs / "series", tokenizer, (1, 2))
    write_own_task(ask.inputs)
    (ask.inputs / "sweep.py").write_text(SWEEP)
    done = run(ask, "score series --pack pack --out scores", ask.inputs)
    assert done["status"] == 0, done


def fresh(ask: Any, name: str) -> Path:
    """A working directory with the inputs in it."""
    folder = ask.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in ask.inputs.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def injected(
    ask: Any, command: str, fault: str, points: int, reruns: bool = True, only: str = ""
) -> tuple[collections.Counter, list[str]]:
    """Inject a fault at up to `points` of its places, with `only` of those in files of that word in their paths;
    returns how often what happened, and what should not have.

    reruns: whether the command is run again after each; else only after the one in the middle.
    """
    kind, line = COMMANDS[command]
    error, once = FAULTS[fault]
    seen, wrong = collections.Counter[str](), list[str]()
    whole = ask.folder / f"whole {command}"
    if not whole.exists():
        run(ask, line, fresh(ask, whole.name), kind)
    counting = whole if command in REPLACES else fresh(ask, "counting")
    counted = run(ask, line, counting, kind, error, only=only)
    right = counted["state"]
    assert counted["status"] == 0 and right, counted
    seen["places"] = counted["count"]
    places = sorted({1 + i * (counted["count"] - 1) // max(1, points - 1) for i in range(points)})
    for at in places:
        folder = fresh(ask, "faulty")
        if command in REPLACES:
            shutil.copytree(whole / "x", folder / "x")
        done = run(ask, line, folder, kind, error, at, once, only)
        label = f"{command}, {fault} at {at}: {done['status']}"
        seen["tried"] += 1
        if done["status"] == 0:
            seen["exit 0, whole"] += 1
            if done["state"] != right:
                wrong.append(f"{label}, but {done['state'] or done.get('why')}")
            continue
        seen["killed" if error == -1 else "refused"] += 1
        said = done["said"].strip().splitlines() or [""]
        if error == -1:
            if done["status"] != -signal.SIGKILL:
                wrong.append(f"{label}: {said[-3:]}")
            done = run(ask, "", folder, kind)
        elif done["status"] not in (1, 2) or "Traceback" in done["said"] or not said[-1].startswith("fineline: "):
            wrong.append(f"{label}: {said[-12:]}")
        if command in REPLACES and done["state"] != right:
            wrong.append(f"{label}: what was there is lost: {done['state'] or done.get('why')}")
        seen["left beside"] += (
            len([path for path in folder.iterdir() if path.name != "x" and not path.is_symlink()]) > 0
        )
        if not reruns and at != places[len(places) // 2]:
            continue
        seen["run again"] += 1
        again = run(ask, line, folder, kind)
        if command in ("export", "import", "traces --relative") and again["status"] == 2 and again["state"] == right:
            continue  # it was there already: the fault came behind its last rename
        if again["status"] != 0 or again["state"] != right:
            wrong.append(f"{label}: run again: {again['status']} {again['said'].strip().splitlines()[-3:]}")
    return seen, wrong


def test_a_fault_is_told_and_nothing_is_lost(ask) -> None:
    for fault in ("ENOSPC", "SIGKILL"):
        seen, wrong = injected(ask, "data prepare amber", fault, points=3, reruns=False)
        assert not wrong and seen["tried"] == 3, "\n".join(wrong)


@pytest.mark.slow
def test_every_command_under_every_fault(ask, capsys) -> None:
    """Prints the table. FINELINE_FAULT_POINTS: places per command and fault; FINELINE_FAULT_COMMANDS, FINELINE_FAULTS:
    some of them."""
    counted = ("places", "tried", "exit 0, whole", "refused", "killed", "run again", "left beside")
    rows: list[tuple[str, ...]] = [("command", "fault", *counted, "wrong")]
    wrong: list[str] = []
    make_scores(ask)
    asked = os.environ.get("FINELINE_FAULT_POINTS")
    for command in os.environ.get("FINELINE_FAULT_COMMANDS", ",".join(COMMANDS)).split(","):
        for fault in os.environ.get("FINELINE_FAULTS", ",".join(FAULTS)).split(","):
            points = int(asked) if asked else LONG.get(command, 12)
            seen, bad = injected(ask, command, fault, points, reruns=points > 4)
            rows.append((command, fault, *(str(seen[name]) for name in counted), str(len(bad))))
            wrong += bad
            with capsys.disabled():
                print(*rows[-1], *bad, sep="\n  ", flush=True)
    with capsys.disabled():
        print("\n" + text_table(rows))
    assert not wrong


@pytest.mark.slow
def test_what_other_libraries_write_is_told_when_the_disk_is_full(ask, capsys) -> None:
    rows, wrong = [("library", "command", "places", "tried", "refused", "wrong")], []
    make_scores(ask)
    for library, (command, word) in LIBRARIES.items():
        seen, bad = injected(ask, command, "ENOSPC", points=3, reruns=False, only=word)
        counted = (str(seen[name]) for name in ("places", "tried", "refused"))
        rows.append((library, command, *counted, str(len(bad))))
        with capsys.disabled():
            print(*rows[-1], *bad, sep="\n  ", flush=True)
        wrong += bad if seen["refused"] else [*bad, f"{library}: no fault of it is told: {seen}"]
    with capsys.disabled():
        print("\n" + text_table(rows))
    assert not wrong, "\n".join(wrong)
