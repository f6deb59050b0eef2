"""What several tests do with runs: start commands, wait for a step, compare two runs bit by bit."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.runs.store import load_items
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape, Recipe
from fineline_jax.training.metrics import TIMINGS, read_metrics
from fineline_jax.training.step import abstract_state

MINI_RECIPE = """
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import *

def recipe():
    model = ModelConfig(vocab_size=512, width=16, layers=1, heads=2, mlp_width=16, context=96)
    data, optimizer = Data((Source("data"),), sequence_length=8), Optimizer(Schedule())
    compute, logging = Compute(dtype="float32", remat="none"), Logging(every_steps=1, tensorboard=False)
    kept, mesh = Checkpoints(every=(Every(64),)), MeshShape(fsdp=1)
    return Recipe("mini", model, data, Batch(4), optimizer, 256, kept, mesh=mesh, compute=compute, logging=logging)
"""
"""The file of a recipe that trains in a second on the data set `data` of 512 ids beside it, in eight steps."""


def lines_of(run: Path) -> list[dict]:
    """The metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(run)]


def states_of(run: Path, recipe: Recipe) -> list[list[bytes]]:
    """Every bit of every kept state, parameters and moments."""
    target = abstract_state(recipe, make_mesh(MeshShape(fsdp=1), jax.devices()[:1]))
    folders = [checkpoint.location for checkpoint in open_series(str(run)).checkpoints]
    return [[np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(load_items(f, target))] for f in folders]


def assert_same_run(run: Path, whole: Path, recipe: Recipe) -> None:
    assert lines_of(run) == lines_of(whole)
    assert states_of(run, recipe) == states_of(whole, recipe)


def start(arguments: list[str], cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | environment
    command = [sys.executable, "-m", "fineline_jax", *arguments]
    return subprocess.Popen(command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def in_a_process(program: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a program on one CPU device to its end."""
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    path = run / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and f'"step": {step},' in path.read_text()):
        time.sleep(0.005)


def events(folder: Path) -> list:
    """TensorBoard's event files, oldest first: records of length (8 bytes), 4 bytes, event, 4 bytes."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob("events*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            found.append(Event.FromString(data[place + 12 : place + 12 + size]))
            place += 16 + size
    return found
