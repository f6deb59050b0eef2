"""Weights & Biases without a network: one run per folder, which a resumed run goes on with."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fineline_jax.catalogue import load_recipe
from fineline_jax.errors import UserError
from fineline_jax.recipe import Logging
from fineline_jax.training.metrics import MetricsLog

wandb = pytest.importorskip("wandb", reason="needs the wandb extra")

RECIPE = dataclasses.replace(
    load_recipe("demo"), logging=Logging(tensorboard=False, wandb_project="trajectories"), seed=7
)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Neither network nor the account of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # it reads its environment once


def sent(folder: Path) -> tuple[str, str, dict[int, float]]:
    """Run id, project and loss per step of one offline run, from the file that `wandb sync` uploads.

    wandb's own process writes it, on a busy machine a moment after `finish`.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    run, losses, ends = None, {}, time.monotonic() + 30
    while run is None and time.monotonic() < ends:
        for record in map(Record.FromString, records(file.read_bytes())):
            if record.HasField("run"):
                run = record.run
            if record.HasField("history"):
                items = {".".join(item.nested_key): float(item.value_json) for item in record.history.item}
                losses[int(items["_step"])] = items["loss"]
        time.sleep(0.1)
    assert run is not None
    return run.run_id, run.project, losses


def records(data: bytes) -> Iterator[bytes]:
    """A LevelDB log behind 7 bytes: blocks of 32 KiB; in them checksum (4 bytes), size (2), kind (1) and the bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, the last piece of one
            yield whole
            whole = b""


def test_a_run_and_its_resumption_are_one_run_in_the_runs_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    for newest, steps in ((None, range(1, 4)), (2, range(3, 6))):
        log = MetricsLog(run, RECIPE, newest)
        for step in steps:
            log.write({"step": step, "loss": 1.0 / step})
        log.close()
    first, second = (sent(folder) for folder in sorted((run / "wandb").glob("offline-run-*")))
    assert first[:2] == second[:2] == ((run / "wandb" / "id").read_text(), "trajectories")
    assert first[2] | second[2] == {step: 1.0 / step for step in range(1, 6)}
    assert [path.name for path in tmp_path.glob("wandb*")] == []


def test_two_folders_of_one_name_are_two_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = set()
    for place in ("a", "b"):
        run = tmp_path / place / "run"
        run.mkdir(parents=True)
        MetricsLog(run, RECIPE, None).close()
        ids.add((run / "wandb" / "id").read_text())
    assert len(ids) == 2


def test_without_a_login_the_remedy_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match=r"logging\.wandb_project='trajectories': .*WANDB_MODE=offline") as error:
        MetricsLog(tmp_path, RECIPE, None)
    assert "\n" not in str(error.value)
