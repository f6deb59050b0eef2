"""What several processes must agree on, and how they end: too little memory, a lost process, a folder of one's own."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import free_port, in_a_process
from data_examples import amber

from fineline_jax import multihost
from fineline_jax.commands.processes import Processes
from fineline_jax.data.corpora import prepare_amber
from fineline_jax.errors import UserError
from fineline_jax.folder_lock import writing
from fineline_jax.mesh import make_mesh
from fineline_jax.multihost import device_errors
from fineline_jax.recipe import MeshShape

OOM = jax.errors.JaxRuntimeError
GLOO = "UNKNOWN: Gloo AllGather failed: [external/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:75"


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34359738368 bytes.", "34359738368 bytes wanted"),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\n[tf-allocator]", "123 bytes wanted"),
        ("RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 31.24G of 15.48G hbm.", "31.24G of 15.48G used"),
        ("RESOURCE_EXHAUSTED: Attempting to allocate 1.50G. There are 1.20G free.", "1.50G wanted"),
    ],
)  # fmt: skip
def test_too_little_memory_is_one_line_with_what_needs_less(said: str, wanted: str, monkeypatch) -> None:
    """The messages of XLA's allocators on CPU and GPU, and of its compiler for TPUs."""
    with (
        pytest.raises(UserError, match=f"too little memory: {wanted}; fewer layers need less"),
        device_errors("fewer layers need less"),
    ):
        raise OOM(said)

    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 80_000, "bytes_in_use": 79_000}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(UserError, match=f"{wanted}, 1,000 of 80,000 bytes free; x"), device_errors("x"):
        raise OOM(said)


def test_other_errors_pass() -> None:
    for error in (OOM("INTERNAL: a fault"), ValueError("no"), OOM(GLOO), KeyError("x")):
        with pytest.raises(type(error)) as raised, device_errors("x"):
            raise error
        assert raised.value is error, "with one process nobody is lost"


def test_a_lost_process_is_named_and_ends_this_one(monkeypatch, capsys) -> None:
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        assert status == 143
        raise Ended

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(multihost.os, "_exit", end)
    for error in (ValueError(GLOO), OOM(GLOO)):  # of a compiled and of a dispatched collective
        with pytest.raises(Ended), device_errors("x"):
            raise error
        line = capsys.readouterr().err
        assert line.startswith(
            "fineline: process 0 of 4: another process at 10.0.0.7 has ended; start all of them again"
        )
        assert line.count("\n") == 1


def test_a_folder_that_is_not_shared_is_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(multihost, "SHARED_SECONDS", 0.1)
    monkeypatch.setattr(multihost, "broadcast_from_process_0", lambda value: value)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    gathered: list[int] = []

    def gather(value: np.int32) -> np.ndarray:
        gathered.append(int(value))
        return np.array([1, 0, int(value)])

    monkeypatch.setattr(multihost.multihost_utils, "process_allgather", gather)
    with (
        writing(tmp_path / "run", "--run"),
        pytest.raises(
            UserError, match=r"--run .*run: not shared: process 1 of 3 does not see what process 0 writes there"
        ),
    ):
        multihost._check_shared(tmp_path / "run", "--run", None)
    assert gathered == [1]
    monkeypatch.setattr(multihost, "broadcast_from_process_0", lambda value: "held by another host")
    began = time.monotonic()
    with pytest.raises(UserError, match="process 1, 2 of 3"):
        multihost._check_shared(tmp_path / "run", "--run", None)
    assert gathered == [1, 0] and 0.1 <= time.monotonic() - began < 5


def test_a_mesh_that_the_topology_does_not_have_is_one_line(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError(
            "Failed to find assignment for logical_axis_index 1 of size 3 with\nremaining assignable mesh"
        )

    monkeypatch.setattr(jax, "make_mesh", refuse)
    with pytest.raises(
        UserError, match=r"mesh\.replica=1, mesh\.fsdp=1, mesh\.tensor=1 cannot be laid over .* choose other"
    ):
        make_mesh(MeshShape(fsdp=1), jax.devices()[:1])


RECIPE = """
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import *

def recipe():
    model = ModelConfig(vocab_size=512, width=16, layers=1, heads=2, mlp_width=16, context=96)
    data, optimizer = Data((Source("data"),), sequence_length=8), Optimizer(Schedule())
    compute, logging = Compute(dtype="float32", remat="none"), Logging(tensorboard=False)
    kept = Checkpoints(latest_every_tokens=32 * 50)
    return Recipe("mini", model, data, Batch(4), optimizer, 32 * 10**6, mesh=MeshShape(fsdp=2), compute=compute,
                  logging=logging, checkpoints=kept)
"""
ONE = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
from fineline_jax.cli import main
command = ["pretrain", "mini.py", "--run", "run", "--distributed"]
status = main([*command, "--coordinator", sys.argv[1], "--processes", sys.argv[2], "--process", sys.argv[3]])
sys.stdout.flush()
sys.exit(status)
"""


ALONE = """
import sys
from fineline_jax.commands.processes import Processes, joined
with joined(True, Processes(sys.argv[1], 2, int(sys.argv[2]), start_timeout=1)):
    print("joined")
"""


@pytest.mark.parametrize("process", ["0", "1"])
def test_a_process_whose_others_never_come_ends_in_one_line(process: str) -> None:
    done = in_a_process(ALONE, f"127.0.0.1:{free_port()}", process)
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr == (
        "fineline: --distributed: not all processes connected within 1 s (--start-timeout); start all of them again,"
        " with the address of process 0\n"
    )
    with pytest.raises(UserError, match="--start-timeout 0: must be at least one second"):
        Processes(start_timeout=0).check(True)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["Ctrl-C", "killed 0 of 2", "killed 1 of 2", "killed 0 of 4", "killed 2 of 4"])
def test_processes_end_together(end: str, tmp_path: Path) -> None:
    """Ctrl-C reaches all and all save; when one is killed, each other ends in one line that names it."""
    killed, count = map(int, end.split()[1::2]) if end != "Ctrl-C" else (None, 2)
    amber(tmp_path / "train_0.jsonl", [[(7 * i + j) % 400 for j in range(9)] for i in range(4000)])
    prepare_amber([tmp_path / "train_0.jsonl"], tmp_path / "data", vocab_size=512, sequence_length=8)
    (tmp_path / "mini.py").write_text(RECIPE.replace("fsdp=2", f"fsdp={count}"))
    address = f"127.0.0.1:{free_port()}"
    all_of_them = [
        subprocess.Popen(
            [sys.executable, "-c", ONE, address, str(count), str(index)],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("run/checkpoints/*/complete.json")):
            assert time.monotonic() < deadline and all(one.poll() is None for one in all_of_them)
            time.sleep(0.2)
        for one in all_of_them if killed is None else [all_of_them[killed]]:
            one.send_signal(signal.SIGINT if killed is None else signal.SIGKILL)
        said = [one.communicate(timeout=120) for one in all_of_them]
    finally:
        for one in all_of_them:
            one.kill()
    if killed is None:
        assert [one.returncode for one in all_of_them] == [0] * count, said
        assert re.search(r"stopped by SIGTERM at step (\d+)", said[0][0]), said
        return
    for index, one in enumerate(all_of_them):
        if index != killed:
            lines = [line for line in said[index][1].splitlines() if line.startswith("fineline: ")]
            assert one.returncode == 143 and lines == [
                f"fineline: process {index} of {count}: process {killed} has ended; start all of them again, the work"
                " goes on from what is saved"
            ], said[index]


def test_the_end_of_a_process_is_told_to_all_by_process_0_and_an_orderly_end_is_none(monkeypatch) -> None:
    """Three processes of one job as threads' ends of sockets: 1 dies; 2 says that it is done, and dies."""
    ended: list[str] = []
    monkeypatch.setattr(multihost, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(multihost, "_end", ended.append)
    (here_1, there_1), (here_2, there_2) = socket.socketpair(), socket.socketpair()
    monkeypatch.setattr(multihost, "_watching", [here_1, here_2])
    there_2.sendall(b"done")
    here_2.settimeout(5)
    began = time.monotonic()
    multihost._watch(2, here_2)
    assert ended == [] and time.monotonic() - began < 2, "its end comes only after that of process 0"
    there_2.shutdown(socket.SHUT_WR)
    there_1.sendall(b"fail")
    multihost._watch(1, here_1)
    assert ended == ["process 1"] and there_2.recv(4) == (1).to_bytes(4)
    multihost._ending.set()  # this one has an error of its own to tell
    there_1.sendall(b"fail")
    try:
        multihost._watch(1, here_1)
    finally:
        multihost._ending.clear()
    assert ended == ["process 1"]
