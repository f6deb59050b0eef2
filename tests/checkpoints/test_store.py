"""Saving and restoring the states of a run."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from store_examples import CONFIG, abstract_state, advanced, bits, fresh_state, largest_file, open_store, truncate

from fineline_jax.checkpoints.runs import store as store_module
from fineline_jax.checkpoints.runs.digest_record import RECORD, damage, read_record, write_record
from fineline_jax.checkpoints.runs.store import CheckpointStore, steps
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder
from fineline_jax.recipe import MeshShape


def trained(folder: Path, last: int, kept: tuple[int, ...], latest_every: int) -> dict[int, list[bytes]]:
    """A run of `last` steps; the bits of every state."""
    state, history = fresh_state(make_mesh()), {}
    with open_store(folder, kept, latest_every) as store:
        for step in range(last + 1):
            history[step] = bits(state)
            store.maybe_save(step, state)
            state = advanced(state)
    return history


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_restored_state_is_bitwise_the_saved_one_although_its_buffers_were_donated_at_once(
    tmp_path: Path,
) -> None:
    history = trained(tmp_path, 4, kept=(0, 2, 4), latest_every=0)
    mesh = make_mesh()
    target = abstract_state(mesh)
    store = open_store(tmp_path)
    for step in (0, 2, 4):
        found, state = store.restore(target, step)
        assert found == step
        assert bits(state) == history[step]
    assert jax.tree.structure(state) == jax.tree.structure(target)


@pytest.mark.parametrize("shape", [MeshShape(1, 4, 1), MeshShape(2, 2, 2), MeshShape(1, 1, 1)])
def test_a_state_moves_to_another_mesh_with_equal_bits(tmp_path: Path, shape: MeshShape) -> None:
    history = trained(tmp_path, 0, kept=(0,), latest_every=0)
    mesh = make_mesh(shape, jax.devices()[: shape.replica * shape.fsdp * shape.tensor])
    target = abstract_state(mesh)
    _, state = open_store(tmp_path).restore(target)
    assert bits(state) == history[0]
    assert state["params"]["layers"]["q"].sharding.mesh == mesh
    assert jax.tree.all(jax.tree.map(lambda x, t: x.sharding == t.sharding, state, target))


def test_kept_steps_stay_and_one_rolling_latest_follows(tmp_path: Path) -> None:
    trained(tmp_path, 11, kept=(0, 4, 8), latest_every=3)
    assert names(tmp_path) == ["0", "4", "8", "9"]
    records = {step: read_record(tmp_path / str(step)) or {} for step in (0, 4, 8, 9)}
    assert {step: record["kept"] for step, record in records.items()} == {0: True, 4: True, 8: True, 9: False}
    assert [records[9][key] for key in ("step", "tokens", "recipe")] == [9, 900, "test"]


def test_orbax_finds_the_same_metadata(tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    trained(tmp_path, 3, kept=(3,), latest_every=0)
    metadata = ocp.checkpointables_metadata(str(tmp_path / "3"))
    assert metadata.custom_metadata == {"step": 3, "tokens": 300, "kept": True, "recipe": "test"}
    assert set(metadata.metadata) >= {"params", "opt_state"}


def test_a_step_is_saved_when_forced_and_not_twice(tmp_path: Path) -> None:
    state = fresh_state(make_mesh())
    with open_store(tmp_path, kept=(8,)) as store:
        assert not store.maybe_save(5, state)
        assert store.maybe_save(5, state, force=True)
        assert not store.maybe_save(5, state, force=True)
    with open_store(tmp_path, kept=(5,)) as store:
        assert not store.maybe_save(5, state)


def test_a_rolling_checkpoint_that_became_a_milestone_of_a_longer_recipe_stays(tmp_path: Path) -> None:
    trained(tmp_path, 3, kept=(), latest_every=3)
    with open_store(tmp_path, kept=(3, 6)) as store:
        store.maybe_save(6, fresh_state(make_mesh()))
    assert names(tmp_path) == ["3", "6"]


def test_params_are_read_alone(tmp_path: Path) -> None:
    history = trained(tmp_path, 1, kept=(1,), latest_every=0)
    shutil.rmtree(tmp_path / "1" / "opt_state")
    from fineline_jax.checkpoints.runs.store import check_intact, load_items

    check_intact(tmp_path / "1", "params")
    params = load_items(tmp_path / "1", {"params": decoder.abstract_params(CONFIG, make_mesh())})["params"]
    assert bits(params) == history[1][-len(jax.tree.leaves(params)) :]


def remove(folder: Path) -> str:
    path = largest_file(folder)
    path.unlink()
    return path.name


def flip_one_bit(folder: Path) -> str:
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name


def lose_the_record(folder: Path) -> str:
    (folder / RECORD).write_text("{")
    return ""


@pytest.mark.parametrize("harm", [truncate, remove, flip_one_bit, lose_the_record])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, harm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    history = trained(tmp_path, 6, kept=(0, 4, 6), latest_every=0)
    culprit = harm(tmp_path / "6")
    target = abstract_state(make_mesh())
    with caplog.at_level(logging.WARNING), open_store(tmp_path, kept=(0, 4, 6)) as store:
        step, state = store.restore(target)
        assert step == 4 and bits(state) == history[4]
        assert f"{tmp_path / '6'}" in caplog.text and culprit in caplog.text
        assert names(tmp_path) == ["0", "4", "6.damaged"], "nothing of the user's is deleted"
        assert store.maybe_save(6, state), "the step can be saved again"
    assert store.latest_intact() == 6


def test_without_an_intact_checkpoint_the_run_does_not_silently_start_again(tmp_path: Path) -> None:
    trained(tmp_path, 0, kept=(0,), latest_every=0)
    truncate(tmp_path / "0")
    for _ in range(2):
        with pytest.raises(UserError, match="no intact checkpoint is left"):
            open_store(tmp_path).latest_intact()
    shutil.rmtree(tmp_path / "0.damaged")
    assert open_store(tmp_path).latest_intact() is None


def test_a_checkpoint_of_another_model_is_refused_by_array(tmp_path: Path) -> None:
    trained(tmp_path, 0, kept=(0,), latest_every=0)
    sharding = abstract_state(make_mesh())["params"]["embed"].sharding
    for name, shape in (("embed", (64, 64)), ("more", (64, 32))):
        target = jax.tree.map(lambda leaf: leaf, abstract_state(make_mesh()))
        target["params"][name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        with pytest.raises(UserError, match=rf"{tmp_path / '0'}: params.{name} is .* in the recipe;"):
            open_store(tmp_path).restore(target)
    with pytest.raises(UserError, match=r"holds no data"):
        open_store(tmp_path).restore({"data": target["params"]})
    assert names(tmp_path) == ["0"]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ('{"item_handlers": 5}', "is no checkpoint that Orbax reads"),  # Orbax raises
        ("[]", r"params\.embed is absent here"),  # Orbax makes do
        ("", "holds no params"),
    ],
)
def test_files_that_are_as_they_were_written_and_no_checkpoint_are_refused_in_one_line(
    tmp_path: Path, metadata: str, reason: str
) -> None:
    """A record vouches for the files, not for what Orbax makes of them."""
    folder = tmp_path / "1"
    (folder / "params" if metadata else folder).mkdir(parents=True)
    for name in ("_CHECKPOINT_METADATA", "params/_METADATA") if metadata else ("x",):
        (folder / name).write_text(metadata)
    write_record(folder, {"step": 1, "tokens": 1, "kept": True, "recipe": "r"})
    with pytest.raises(UserError, match=rf"/1: {reason}") as error:
        open_store(tmp_path).restore({"params": abstract_state(make_mesh())["params"]}, 1)
    assert "\n" not in str(error.value)


def test_a_folder_in_the_way_of_a_save_is_set_aside_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "precious").write_text("kept")
    with open_store(tmp_path, kept=(5,)) as store:
        assert store.maybe_save(5, fresh_state(make_mesh()))
    assert names(tmp_path) == ["5", "5.damaged"]
    assert (tmp_path / "5.damaged" / "precious").read_text() == "kept"


def test_only_the_first_process_looks_at_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first may not have made it yet."""
    sent = [np.frombuffer(json.dumps(value).encode(), np.uint8) for value in ([3, 8], [3, 8], 8)]
    received = iter([part for content in sent for part in (np.int32(len(content)), content)])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.broadcast_one_to_all", lambda mine: next(received))
    store = CheckpointStore(tmp_path / "checkpoints", ())
    assert store.latest_intact() == 8


def test_leftovers_of_a_killed_save_are_cleaned_at_start(tmp_path: Path) -> None:
    trained(tmp_path, 1, kept=(1,), latest_every=0)
    for leftover in ("2.orbax-checkpoint-tmp", "0.deleting"):
        shutil.copytree(tmp_path / "1", tmp_path / leftover)
    shutil.copytree(tmp_path / "1", tmp_path / "3")
    (tmp_path / "3" / RECORD).unlink()  # killed between Orbax's rename and our record
    (tmp_path / "3.saving").touch()
    assert open_store(tmp_path).latest_intact() == 1
    assert names(tmp_path) == ["1"]


RUN_UNTIL_KILLED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from store_examples import *
from fineline_jax.mesh import make_mesh
target = abstract_state(make_mesh())
store = open_store(Path(sys.argv[1]), kept=range(0, 10**6, 5), latest_every=2)
start = store.latest_intact() or 0
print("start", start, flush=True)
for step in range(start, 10**6):
    fill = lambda leaf: jax.device_put(np.full(leaf.shape, step, leaf.dtype), leaf.sharding)
    store.maybe_save(step, jax.tree.map(fill, target))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_an_intact_series(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    here = Path(__file__).parents[1]
    command = [sys.executable, "-c", RUN_UNTIL_KILLED, str(tmp_path), str(here / "helpers"), str(here.parent)]
    newest = -1
    for _ in range(5):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line == f"start {max(newest, 0)}\n", "it resumes where the last one was killed"
            time.sleep(random.uniform(0.5, 3.0))
            os.kill(process.pid, signal.SIGKILL)
        complete = steps(tmp_path)
        assert all(damage(tmp_path / str(step)) is None for step in complete)
        assert not complete or complete[-1] >= newest
        newest = complete[-1] if complete else newest
        kept = [step for step in complete if step % 5 == 0]
        assert kept == list(range(0, (kept[-1] if kept else -5) + 1, 5)), "no kept step is missing"
    mesh = make_mesh()
    assert not any(name.endswith(".damaged") for name in names(tmp_path))
    step, state = open_store(tmp_path, kept=range(0, 10**6, 5)).restore(abstract_state(mesh))
    assert step == newest > 0
    assert all(np.all(np.asarray(leaf) == step) for leaf in jax.tree.leaves(state))


def test_a_full_disk_is_reported_and_the_checkpoint_before_it_is_still_there(tmp_path: Path) -> None:
    small = tmp_path / "small_disk"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=480k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        state = fresh_state(make_mesh())
        saved = bits(state)
        with open_store(small, latest_every=1) as store:
            assert store.maybe_save(1, state)
            store.wait()
            disk = shutil.disk_usage(small)
            assert disk.free < disk.used, "one checkpoint fits, two do not"
            store.maybe_save(2, advanced(state))
            with pytest.raises(UserError, match=rf"{small}/2: the checkpoint could not be written \(no space left"):
                store.wait()
            assert names(small) == ["1"]
            step, found = store.restore(abstract_state(make_mesh()))
            assert step == 1 and bits(found) == saved
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_failed_save_is_reported_at_the_next_step_even_if_none_is_due(tmp_path: Path) -> None:
    state = fresh_state(make_mesh())
    with open_store(tmp_path, kept=(1,)) as store:
        store.maybe_save(1, state)
        store.wait()
        store._pending = store._worker.submit(store._finish, 2, Failing(), {}, {})
        time.sleep(0.2)
        with pytest.raises(UserError, match=r"could not be written .disk on fire"):
            store.maybe_save(3, state)
        assert names(tmp_path) == ["1"]


def test_a_checkpoint_that_does_not_read_back_is_not_recorded(tmp_path: Path, monkeypatch) -> None:
    """What Orbax wrote is compared, before the record, with what it was given: names, shapes, dtypes."""
    given = {"params": {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4, jnp.bfloat16)}}
    with open_store(tmp_path, kept=(1, 2)) as store:
        store.maybe_save(1, given)
    assert damage(tmp_path / "1") is None
    save = store_module.ocp.save_checkpointables_async
    for change, told in (
        (
            {"a": jnp.zeros((3, 2)), "b": given["params"]["b"]},
            r"params.a reads back as float32\[3, 2\] and was float32",
        ),
        ({"a": given["params"]["a"], "b": jnp.zeros(4)}, "params.b reads back as float32.* and was bfloat16"),
        ({"a": given["params"]["a"]}, "params.b reads back as nothing"),
    ):
        wrong = lambda path, state, change=change, **options: save(path, {"params": change}, **options)
        monkeypatch.setattr(store_module.ocp, "save_checkpointables_async", wrong)
        with pytest.raises(UserError, match=told), open_store(tmp_path, kept=(1, 2)) as store:
            store.maybe_save(2, given)
        assert names(tmp_path) == ["1"]


@pytest.mark.parametrize("name", ["[1]", "a*", "b?", "c\\d", "["])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    """The merge of its files is a glob below the path (ocdbt_utils.py): it finds nothing, or another run's files."""
    with pytest.raises(UserError, match=r"in its path; rename it"):
        open_store(tmp_path / name / "checkpoints")
    assert os.listdir(tmp_path) == []
    with open_store(tmp_path / "]{}'é ~" / "checkpoints", kept=(1,)) as store:  # any other name
        store.maybe_save(1, {"params": {"w": jnp.zeros(3)}})
    assert damage(tmp_path / "]{}'é ~" / "checkpoints" / "1") is None


class Failing:
    def result(self) -> None:
        raise OSError("disk on fire")


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    trained(tmp_path, 0, kept=(0,), latest_every=0)
    record = json.loads((tmp_path / "0" / RECORD).read_text())
    assert sum(size for size, _ in record["files"].values()) > 0
    assert all((tmp_path / "0" / name).stat().st_size == size for name, (size, _) in record["files"].items())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure resident memory")
def test_memory_does_not_grow_with_the_number_of_saves(tmp_path: Path) -> None:
    state = {"params": jax.device_put(np.ones((8, 1 << 20), np.float32), jax.devices()[0])}
    used = []
    with open_store(tmp_path, latest_every=1) as store:
        for step in range(60):
            store.maybe_save(step, state)
            store.wait()
            state = advanced(state)
            used.append(resident_bytes())
    # The allocator's arenas fill up at first; what stays behind for ever would be 40 times 32 MB.
    assert used[59] - used[19] < 5 * 32e6


TWO_PROCESSES = """
import sys
from pathlib import Path
folder, index, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sys.path[:0] = sys.argv[4:]
import jax
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
from store_examples import *
from fineline_jax.mesh import make_mesh
assert jax.process_count() == 2 and jax.device_count() == 4
target = abstract_state(make_mesh())
def state(step):
    def place(leaf):
        values = np.full(leaf.shape, step, leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda part: values[part])
    return jax.tree.map(place, target)
with open_store(folder, kept=(0, 2), latest_every=1) as store:
    for step in range(4):
        store.maybe_save(step, state(step))
if index == 0:
    truncate(folder / "3")
with open_store(folder, kept=(0, 2), latest_every=1) as store:
    step, found = store.restore(target)
    assert step == 2, step
    shards = [shard.data for leaf in jax.tree.leaves(found) for shard in leaf.addressable_shards]
    assert all(np.all(np.asarray(shard) == 2) for shard in shards)
    assert store.maybe_save(3, state(3))
print("process", index, "done")
"""


@pytest.mark.slow
def test_two_processes_save_agree_on_the_damage_and_resume(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = Path(__file__).parents[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = []
    for index in range(2):
        arguments = [str(tmp_path), str(index), port, str(here / "helpers"), str(here.parent)]
        command = [sys.executable, "-c", TWO_PROCESSES, *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for index, output in enumerate(outputs):
        assert f"process {index} done" in output, output[-3000:]
    assert names(tmp_path) == ["0", "2", "3", "3.damaged"]


def test_a_checkpoint_is_these_files_and_no_others(tmp_path: Path) -> None:
    """Orbax's layout without a sharding file: what reads it names its own shardings."""
    trained(tmp_path, 0, kept=(0,), latest_every=0)
    found = {
        re.sub(r"[0-9a-f]{32}", "*", path.relative_to(tmp_path / "0").as_posix()) for path in files(tmp_path / "0")
    }
    of_item = ("_METADATA", "array_metadatas/process_0", "d/*", "manifest.ocdbt", "ocdbt.process_0/d/*",
               "ocdbt.process_0/manifest.ocdbt")  # fmt: skip
    expected = {f"{item}/{name}" for item in ("params", "opt_state") for name in of_item}
    top = {"_CHECKPOINT_METADATA", "commit_success.txt", "orbax.checkpoint", "complete.json"}
    assert found - {"commit_success.txt"} == (expected | top) - {"commit_success.txt"}
    record = read_record(tmp_path / "0") or {}
    names = {path.relative_to(tmp_path / "0").as_posix() for path in files(tmp_path / "0")}
    assert record["files"].keys() == names - {RECORD}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_arrays_are_stored_as_they_are_and_orbax_alone_reads_them(tmp_path: Path) -> None:
    """Uncompressed: a constant array takes its bytes."""
    from orbax.checkpoint import v1 as ocp

    ones = {"params": {"w": jnp.ones((64, 1024))}, "opt_state": {"m": jnp.full((7, 3), 2, jnp.bfloat16)}}
    with open_store(tmp_path, kept=(5,)) as store:
        assert store.maybe_save(5, ones)
    assert sum(path.stat().st_size for path in files(tmp_path / "5" / "params")) > 64 * 1024 * 4
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), ones)
    assert bits(ocp.load_checkpointables(str(tmp_path / "5"), target)) == bits(ones)


@pytest.mark.parametrize(
    ("kept", "latest_every", "due"),
    [((0, 4, 8), 3, [0, 3, 4, 6, 8, 9]), ((4,), 0, [4]), ((), 5, [0, 5, 10]), ((), 0, []), ((10,), 1, list(range(11)))],
)
def test_a_step_is_due_if_it_is_kept_or_one_of_the_rolling_ones(
    tmp_path: Path, kept: tuple[int, ...], latest_every: int, due: list[int]
) -> None:
    with open_store(tmp_path, kept, latest_every) as store:
        assert [step for step in range(11) if store.is_due(step)] == due


def test_which_checkpoints_lie_there_after_each_save(tmp_path: Path) -> None:
    """Kept ones for ever; of the others the newest, until any newer one is complete. Steps of one and of two digits."""
    state, seen = {"params": {"w": jnp.zeros(3)}}, {}
    with open_store(tmp_path, kept=(0, 9, 12), latest_every=2) as store:
        for step in range(13):
            if store.maybe_save(step, state, force=step == 11):
                assert (tmp_path / f"{step}.saving").exists() or read_record(tmp_path / str(step))
                store.wait()
                seen[step] = sorted(int(name) for name in names(tmp_path))
    assert seen == {
        0: [0], 2: [0, 2], 4: [0, 4], 6: [0, 6], 8: [0, 8], 9: [0, 9], 10: [0, 9, 10], 11: [0, 9, 11], 12: [0, 9, 12],
    }  # fmt: skip
    assert [bool(read_record(tmp_path / str(step))["kept"]) for step in (0, 9, 12)] == [True] * 3  # type: ignore[index]
    assert steps(tmp_path) == [0, 9, 12] and open_store(tmp_path).latest_intact() == 12


def test_the_newest_is_that_of_the_highest_number(tmp_path: Path) -> None:
    with open_store(tmp_path, latest_every=1) as store:
        store.maybe_save(9, {"params": {"w": jnp.zeros(3)}}, force=True)
    with open_store(tmp_path, kept=(10,)) as store:
        store.maybe_save(10, {"params": {"w": jnp.ones(3)}})
    (tmp_path / "x").mkdir()
    shutil.copytree(tmp_path / "10", tmp_path / "9")
    assert steps(tmp_path) == [9, 10]
    target = {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=jnp.zeros(3).sharding)}}
    step, state = open_store(tmp_path).restore(target)
    assert step == 10 and state["params"]["w"].dtype == "bfloat16" and state["params"]["w"].tolist() == [1, 1, 1]
    next(path for path in (tmp_path / "10" / "params").rglob("*") if path.is_file()).unlink()
    assert open_store(tmp_path).latest_intact() == 9, "10 is looked at before 9"


def test_a_step_that_is_still_being_saved_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = store_module.write_record
    monkeypatch.setattr(store_module, "write_record", lambda *given: (time.sleep(0.5), write(*given)))
    state = {"params": {"w": jnp.ones(3)}}
    with open_store(tmp_path, kept=(1,)) as store:
        store.maybe_save(1, state)
        target = {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=state["params"]["w"].sharding)}}
        assert store.restore(target, 1)[1]["params"]["w"].tolist() == [1, 1, 1]


def test_what_an_earlier_recipe_kept_stays_and_its_rolling_latest_does_not(tmp_path: Path) -> None:
    state = {"params": {"w": jnp.zeros(3)}}
    for kept, saved in (((1,), (1, 2)), ((), (3,))):
        with open_store(tmp_path, kept=kept, latest_every=1) as store:
            for step in saved:
                store.maybe_save(step, state)
    assert names(tmp_path) == ["1", "3"]


def test_a_save_is_marked_as_one_until_its_record_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is killed before is removed at the next start, and not set aside as damage."""
    seen, write = [], store_module.write_record
    monkeypatch.setattr(store_module, "write_record", lambda *given: (seen.append(names(tmp_path)), write(*given)))
    with open_store(tmp_path, latest_every=1) as store:
        store.maybe_save(1, {"params": {"w": jnp.zeros(3)}})
    assert seen == [["1", "1.saving"]] and names(tmp_path) == ["1"]


def test_until_a_new_one_is_complete_the_rolling_one_before_it_stays(tmp_path: Path) -> None:
    state = {"params": {"w": jnp.zeros(3)}}
    with open_store(tmp_path, latest_every=1) as store:
        store.maybe_save(1, state)
        store.wait()
        store._pending = store._worker.submit(store._finish, 2, Failing(), {}, {})
        with pytest.raises(UserError, match="disk on fire"):
            store.wait()
        assert names(tmp_path) == ["1"] and store.latest_intact() == 1


def test_a_damaged_checkpoint_that_is_asked_for_by_its_step_is_refused_and_left_there(tmp_path: Path) -> None:
    with open_store(tmp_path, kept=(1, 2)) as store:
        for step in (1, 2):
            store.maybe_save(step, {"params": {"w": jnp.zeros(3)}})
    flip_one_bit(tmp_path / "1")
    target = {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.zeros(3).sharding)}}
    with pytest.raises(
        UserError, match=rf"{tmp_path / '1'}: the checkpoint is damaged \(the content of .* has changed"
    ):
        open_store(tmp_path).restore(target, 1)
    with pytest.raises(UserError, match="holds no checkpoint; train first"):
        open_store(tmp_path / "new").restore(target)
    assert names(tmp_path) == ["1", "2", "new"]


def test_what_is_set_aside_again_gets_a_number(tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "4").mkdir()
        with pytest.raises(UserError, match="no intact checkpoint is left"):
            open_store(tmp_path).latest_intact()
    assert names(tmp_path) == ["4.damaged", "4.damaged-2", "4.damaged-3"]


def test_a_complete_checkpoint_whose_mark_was_left_stays_and_one_without_a_mark_is_damage(tmp_path: Path) -> None:
    """Killed behind the record and before the mark went; and: what nobody was saving is not removed."""
    with open_store(tmp_path, kept=(1, 2)) as store:
        for step in (1, 2):
            store.maybe_save(step, {"params": {"w": jnp.zeros(3)}})
    (tmp_path / "1.saving").touch()
    (tmp_path / "2" / RECORD).unlink()
    store = open_store(tmp_path)
    assert names(tmp_path) == ["1", "2"]
    assert store.latest_intact() == 1 and names(tmp_path) == ["1", "2.damaged"]


def test_of_two_errors_the_first_is_told_and_the_other_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for error in (None, ZeroDivisionError):
        with pytest.raises(error or UserError), open_store(tmp_path, kept=(1,)) as store:
            store._pending = store._worker.submit(store._finish, 2, Failing(), {}, {})
            if error:
                raise error
    assert caplog.text.count("disk on fire") == 1


@pytest.mark.parametrize("fails", ["start", "worker", "commit", "record"])
def test_a_save_that_fails_anywhere_leaves_orbax_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """The lock that keeps saves of several threads apart is given back once, and the error told is that of the save."""
    start, state = store_module.ocp.save_checkpointables_async, {"params": {"w": jnp.zeros(3)}}

    def fail(*given: Any, **options: Any) -> Any:
        raise OSError("disk on fire")

    def saved(*given: Any, **options: Any) -> Any:
        start(*given, **options).result()
        return Failing()

    with monkeypatch.context() as patch:
        if fails != "record":
            patch.setattr(store_module.ocp, "save_checkpointables_async", fail if fails == "start" else saved)
        if fails == "record":
            patch.setattr(store_module, "write_record", fail)
        with pytest.raises(UserError, match=r"\(disk on fire\)"), open_store(tmp_path, kept=(1,)) as store:
            if fails == "worker":
                patch.setattr(store._worker, "submit", fail)
            store.maybe_save(1, state)
    assert not store_module._one_save.locked() and names(tmp_path) == []
    with open_store(tmp_path, kept=(1,)) as store:
        store.maybe_save(1, state)
    assert not store_module._one_save.locked() and names(tmp_path) == ["1"]


def test_a_save_that_failed_is_told_once(tmp_path: Path) -> None:
    with open_store(tmp_path, kept=(1,)) as store:
        store._pending = store._worker.submit(store._finish, 2, Failing(), {}, {})
        with pytest.raises(UserError):
            store.wait()
        store.wait()
        assert store._steps == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "no space left on the disk"),
        (ValueError("RESOURCE_EXHAUSTED: x"), "no space left on the disk"),
        (OSError("Disk QUOTA exceeded"), "no space left on the disk"),
        (ValueError("first line\nsecond"), "first line"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_save_that_failed_says_why_in_one_line_and_leaves_nothing(
    tmp_path: Path, error: Exception, said: str
) -> None:
    store = open_store(tmp_path)
    for name in ("7", "7.orbax-checkpoint-tmp-1", "70"):
        (tmp_path / name).mkdir()
    (tmp_path / "7.saving").touch()
    text = str(store._failed(7, error))
    assert text.startswith(f"{tmp_path / '7'}: the checkpoint could not be written ({said});") and "\n" not in text
    assert names(tmp_path) == ["70"]


def test_weights_alone_are_kept_and_the_state_before_them_stays_until_a_newer_state(tmp_path: Path) -> None:
    """keep=bfloat16 at 2 and 4, a rolling state at 1, 3 and, late, 5; 4 forced: it holds all."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = {name: {"w": jax.device_put(jnp.arange(3.0) / 3, one)} for name in ("params", "opt_state")}
    seen = {}
    options: dict[str, Any] = {
        "is_rolling": lambda step: step in (1, 3, 4),
        "weights_only": ((2, 4), "bfloat16"),
        "record": lambda step: {"tokens": step, "recipe": "r"},
    }
    with CheckpointStore(tmp_path, (2, 4), **options) as store:
        for step in range(6):
            if store.maybe_save(step, state):
                store.wait()
                seen[step] = sorted(int(name) for name in names(tmp_path)), store.latest_intact()
    assert seen == {1: ([1], 1), 2: ([1, 2], 1), 3: ([2, 3], 3), 4: ([2, 3, 4], 3), 5: ([2, 4, 5], 5)}
    target = {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=one)}}
    stored = store_module.load_items(tmp_path / "2", target)["params"]["w"]
    np.testing.assert_array_equal(stored, state["params"]["w"].astype(jnp.bfloat16).astype(jnp.float32))
    assert not (tmp_path / "2" / "opt_state").exists()
    with CheckpointStore(tmp_path, (2, 4), **options) as store:
        assert not store.maybe_save(4, state) and store.maybe_save(4, state, force=True)
        store.wait()
        assert (tmp_path / "4" / "opt_state").is_dir() and "weights" not in (read_record(tmp_path / "4") or {})
