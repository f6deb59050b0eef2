"""How cost grows: a figure (SVG) and tables for each of three parts.

    python benchmarks/growth.py OUT [scoring] [traffic] [loader]

scoring: seconds and tokens against checkpoints, documents, shots (the same for all documents, or drawn for each) and
choices, one varied at a time: made requests of random tokens, a random Llama as wide as the demo's. traffic:
collectives of OpenLLaMA 7B's training step against chips that are not here (needs what `fineline plan` does). loader:
windows per second against processes that read their rows of each batch. Times are the smaller of ROUNDS.
"""

import argparse
import dataclasses
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fineline_jax.cpu_backend import prepare_cpu

prepare_cpu()
import jax
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from fineline_jax.catalogue import load_recipe
from fineline_jax.checkpoints import load
from fineline_jax.checkpoints.formats.huggingface import export_hf
from fineline_jax.checkpoints.open import open_series
from fineline_jax.data.loader import open_batches
from fineline_jax.data.storage import WindowWriter, write_metadata
from fineline_jax.mesh import make_mesh
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.decoder import init_params
from fineline_jax.plan.compiled import Job, compiled
from fineline_jax.plan.topologies import GIB, topology
from fineline_jax.recipe import Batch, Data, MeshShape, Source
from fineline_jax.scoring.engine import prefix_tree, scorer
from fineline_jax.scoring.requests.pack import Ragged, RequestTokens
from fineline_jax.scoring.series.auto_mesh import scoring_mesh

ROUNDS = 2
VOCABULARY, CONTEXT, QUESTION, ANSWER = 1_024, 2_048, 60, 8
BASE = {"checkpoints": 1, "documents": 400, "shots": 4, "choices": 4}
AXES = {"checkpoints": (1, 2, 4, 8), "documents": (100, 200, 400, 800)}
AXES |= {"shots": (0, 4, 8, 16), "shots of each document": (0, 4, 8, 16), "choices": (2, 4, 8, 16)}
DEVICES = (("v4", "v4-16 v4-32 v4-128 v4-512 v4-2048"), ("H100", "h100x8 h100x16 h100x64"))
KINDS = ("all-gather", "reduce-scatter", "all-reduce")
WINDOW, BATCH, STEPS, PROCESSES = 2_048, 64, 60, (1, 2, 4)
Rows = list[dict[str, Any]]


def requests(documents: int, shots: int, choices: int, drawn: bool) -> RequestTokens:
    """One task of random tokens: `shots` solved examples, the same for all documents or drawn for each, then a question
    of QUESTION tokens; each of the choices is an answer of ANSWER tokens."""
    rng = np.random.default_rng(0)
    made = lambda *shape: rng.integers(3, VOCABULARY, shape).astype(np.int32)
    examples = made(documents if drawn else 1, shots * (QUESTION + ANSWER))
    contexts = np.hstack([np.broadcast_to(examples, (documents, examples.shape[1])), made(documents, QUESTION)])
    offsets = np.append(np.arange(documents + 1) * contexts.shape[1], contexts.size + 1)  # last: the prefix token
    answers = made(documents * choices, ANSWER)
    continuations = Ragged(answers.ravel(), np.arange(len(answers) + 1) * ANSWER)
    context_row = np.repeat(np.arange(documents), choices)
    every = Ragged(np.append(contexts.ravel(), np.int32(1)), offsets)
    return RequestTokens(every, continuations, context_row, np.zeros_like(context_row))


def scoring() -> Iterator[tuple[str, Rows]]:
    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig(VOCABULARY, width=128, layers=4, heads=4, mlp_width=320, context=CONTEXT)
        with jax.set_mesh(make_mesh()):
            params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
        export_hf(config, params, Path(folder, "model"))
        series = open_series(f"{folder}/model")
        mesh = scoring_mesh(MeshShape(), [series], "float32")

        def measured(axis: str, value: int) -> dict[str, Any]:
            size = BASE | {axis.partition(" ")[0]: value}
            checkpoints = size.pop("checkpoints")
            asked = requests(**size, drawn=" " in axis)
            cost = prefix_tree.statistics(prefix_tree.plan(asked, CONTEXT))
            times = []
            for _ in range(ROUNDS):
                marks = [time.perf_counter()]
                score = scorer.make_scorer(asked, config, mesh)
                for _ in range(checkpoints + 1):
                    score(load.load(series.checkpoints[0], mesh)[1])
                    marks.append(time.perf_counter())
                times.append((marks[-1] - marks[1], marks[1] - marks[0]))
            seconds, first = np.min(times, axis=0)  # the first plans and compiles, and is not in the seconds
            tokens = checkpoints * cost.unique_tokens, checkpoints * cost.naive_tokens
            names = (axis, "seconds", "first", "unique tokens", "one by one", "one by one / unique")
            row = value, round(float(seconds), 2), round(float(first), 2), *tokens, round(tokens[1] / tokens[0], 1)
            return dict(zip(names, row, strict=True))

        for axis, values in AXES.items():
            yield axis, [measured(axis, value) for value in values]


def traffic() -> Iterator[tuple[str, Rows]]:
    whole = load_recipe("open_llama_7b")
    compute = dataclasses.replace(whole.compute, dtype="bfloat16")
    for device, names in DEVICES:
        for title, per_chip in (f"{whole.batch.sequences:,} windows", 0), ("8 windows per chip", 8):
            rows: Rows = []
            for chosen in map(topology, names.split()):
                mesh = MeshShape(replica=-1, fsdp=min(64, chosen.count))
                batch = Batch(sequences=per_chip * chosen.count or whole.batch.sequences)
                step = compiled(Job(chosen, mesh, dataclasses.replace(whole, batch=batch, compute=compute)))
                memory = f"{step.peak / GIB:.2f}" + ", does not fit" * (not step.fits)
                row: dict[str, Any] = {"chips": chosen.count, "devices": chosen.name, "memory, GiB": memory}
                for kind in KINDS:
                    found = [(one.times, one.times * one.bytes / GIB) for one in step.collectives if one.kind == kind]
                    times, size = np.sum([(0, 0.0), *found], axis=0)
                    row |= {kind: int(times), f"{kind}, GiB": round(float(size), 2)}
                rows.append(row)
            yield f"{device}, {title}", rows


def loader() -> Iterator[tuple[str, Rows]]:
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/data"
        writer = WindowWriter(Path(folder), ["train"], window_tokens=WINDOW + 1, vocab_size=32_000)
        writer.add("train", np.random.default_rng(0).integers(3, 32_000, (BATCH * STEPS, WINDOW + 1)))
        writer.close()
        write_metadata(Path(folder), {"sequence_length": WINDOW, "vocab_size": 32_000, "name": "growth"})
        rows: Rows = []
        for processes in PROCESSES:
            seconds = min(seconds_of_readers(folder, processes) for _ in range(ROUNDS))
            windows = BATCH * STEPS / seconds
            rows.append({"processes": processes, "windows/s": round(windows), "tokens/s": round(windows * WINDOW)})
        yield "windows of 2,048 tokens", rows


def seconds_of_readers(folder: str, processes: int) -> float:
    """How long the slowest of so many processes, which begin together, reads its share of every batch."""
    spawn = multiprocessing.get_context("spawn")
    begin, times = spawn.Barrier(processes), spawn.Queue()
    for process in range(processes):
        spawn.Process(target=read, args=(folder, process, processes, begin, times), daemon=True).start()
    return max(times.get(timeout=300) for _ in range(processes))


def read(folder: str, process: int, processes: int, begin: Any, times: Any) -> None:
    data = Data(sources=(Source(folder),), sequence_length=WINDOW)
    batches = open_batches(data, sequences=BATCH, vocab_size=32_000, seed=0)
    share = slice(process * BATCH // processes, (process + 1) * BATCH // processes)
    batches.rows(0, share)  # opens the files
    begin.wait()
    start = time.perf_counter()
    for step in range(STEPS):
        batches.rows(step, share)
    times.put(time.perf_counter() - start)


PARTS = {  # the lines of each row of panels; a column of panels is a table
    "scoring": (scoring, (("seconds",), ("one by one", "unique tokens"))),
    "traffic": (traffic, (tuple(f"{kind}, GiB" for kind in KINDS), KINDS)),
    "loader": (loader, (("windows/s",),)),
}


def draw(tables: dict[str, Rows], lines: tuple[tuple[str, ...], ...], path: Path) -> None:
    figure = Figure(figsize=(2.4 * len(tables) + 1.4, 2 * len(lines) + 0.3), layout="constrained")
    for place, (title, rows) in enumerate(tables.items(), 1):
        axis, *_ = rows[0]
        for row, names in enumerate(lines):
            panel = figure.add_subplot(len(lines), len(tables), row * len(tables) + place)
            for name in names:
                panel.plot([one[axis] for one in rows], [one[name] for one in rows], "o-", markersize=3, label=name)
            panel.set(title="" if row else title, xlabel=axis, ylim=(0, None))
            panel.tick_params(length=0)
            panel.locator_params(nbins=4)
            if axis == "chips":
                panel.set_xscale("log", base=2)
                panel.set_xticks([one[axis] for one in rows], [str(one[axis]) for one in rows])
            if place == len(tables):
                panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "growth"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        measure, lines = PARTS[part]
        tables: dict[str, Rows] = {}
        for title, rows in measure():
            tables[title] = rows
            print(f"\n{part}: {title}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
            values = [[one if isinstance(one, str) else f"{one:,}" for one in row.values()] for row in rows]
            cells = [list(rows[0]), ["---"] * len(rows[0]), *values]
            print("\n".join(f"| {' | '.join(line)} |" for line in cells), flush=True)
        draw(tables, lines, options.out / f"{part}.svg")


if __name__ == "__main__":
    main()
