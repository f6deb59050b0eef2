"""Arithmetic of a plan, against numbers that others published and against the definitions."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fineline_jax.catalogue import load_recipe
from fineline_jax.errors import UserError
from fineline_jax.plan import compiled as compiling
from fineline_jax.plan import costs, flags, search
from fineline_jax.plan.compiled import Compiled, Job, _wanted
from fineline_jax.plan.hlo import Collective
from fineline_jax.plan.topologies import GIB, topology
from fineline_jax.recipe import MeshShape

RECIPE = load_recipe("open_llama_7b")


def step_of(
    job: Job, peak: float = 9 * GIB, collectives: tuple[Collective, ...] = (), products: float = 2e17, living: int = 0
) -> Compiled:
    mesh = (job.mesh.replica, job.mesh.fsdp, job.mesh.tensor)
    kinds = {"parameters": GIB, "moments": 2 * GIB}
    return Compiled(job, mesh, kinds, int(peak), living, products, collectives, (), 0, 1.0, "")


def test_tokens_per_second_are_those_of_the_published_utilisation() -> None:
    """OpenLLaMA's README: over 2200 tokens/s per TPU-v4 chip, 33.0 % of 275 TFLOP/s by the same formula; axlearn 7B at
    sequence length 2048: 2,704 on v4 (40.6 %), 5,749 on v5p (51.7 %)."""
    for devices, mfu, published in (("v4-512", 0.330, 2200), ("v4-512", 0.406, 2704), ("v5p-128", 0.517, 5749)):
        assert costs.tokens_per_second(RECIPE, topology(devices).chip, mfu) == pytest.approx(published, rel=0.005)


def test_the_least_memory_is_state_gradient_and_layer_inputs() -> None:
    """Eight windows of 2048 tokens, 4096 features in float32, 32 layers: 8 GiB, which `offload` keeps elsewhere."""
    assert costs.least_bytes(RECIPE, 10, 20, 8) == 2 * 10 + 20 + 8 * GIB
    offloaded = dataclasses.replace(RECIPE, compute=dataclasses.replace(RECIPE.compute, remat="offload"))
    assert costs.least_bytes(offloaded, 10, 20, 8) == 2 * 10 + 20


def test_the_cost_model_is_its_definition() -> None:
    plain = dataclasses.replace(RECIPE, compute=dataclasses.replace(RECIPE.compute, attention="xla"))
    job = Job(topology("v4-512"), MeshShape(4, 64), plain)
    compute = 2e17 / 256 / (0.7 * 275e12)
    assert costs.step_seconds(step_of(job)) == pytest.approx(compute)
    one = lambda kind, times, overlapped: Collective(kind, 300 * 10**9, times, overlapped, "", 64)
    moved = (1 - 1 / 64) * 300e9 / 300e9
    gathers, sums = one("all-gather", 2, 1), one("all-reduce", 1, 0)
    assert costs.step_seconds(step_of(job, collectives=(gathers,))) == pytest.approx(max(compute, moved) + moved)
    assert costs.step_seconds(step_of(job, collectives=(sums,))) == pytest.approx(compute + 2 * moved)


def test_the_plan_says_whether_it_fits_and_what_the_run_takes() -> None:
    """250,000 steps of 2**22 tokens; 101 checkpoints of 12 bytes for each of 6,738,415,616 weights."""
    job = Job(topology("v4-512"), MeshShape(4, 64), RECIPE)
    text = costs.report(step_of(job), mfu=0.33)
    assert "9.00 GiB of 30.75 GiB per device: fits, 21.75 GiB left" in text
    assert "250,000 steps, 1.05T tokens" in text and "101 checkpoints of 80.9 GB" in text and "8.2 TB" in text
    assert "does NOT fit, 9.25 GiB too much" in costs.report(step_of(job, peak=40 * GIB))
    amber = Job(topology("v4-512"), MeshShape(1, 256), load_recipe("amber_7b"))
    assert "64 rows fill up the batch, 2.8% for nothing" in costs.report(step_of(amber))


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 44.97G of 30.75G hbm. Exceeded", 44.97),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: program (31.04G) exceeds available HBM (15.75G)", 31.04),
        ("INTERNAL: something else", None),
    ],
)
def test_what_the_compiler_says_of_too_little_memory_is_read(message: str, gib: float | None) -> None:
    assert _wanted(message) == (None if gib is None else pytest.approx(gib * GIB, rel=1e-6))


def test_what_a_policy_saves_is_counted_by_hand() -> None:
    """Eight windows of 2048 tokens, 32 layers, 2 bytes: 2**20 bytes per feature. `context` has 4096 features, queries,
    keys and values 3 x 4096, two norms, gate, up and their product 2 x 4096 + 3 x 11008; two devices of `tensor` share
    them."""
    for remat, features in (("full", 0), ("offload", 0), ("context", 4096), ("qkv_context", 16384), ("none", 57600)):
        recipe = dataclasses.replace(RECIPE, compute=dataclasses.replace(RECIPE.compute, remat=remat, dtype="bfloat16"))
        assert costs.saved_bytes(recipe, 8, 1) == features * 2**20
        assert costs.saved_bytes(recipe, 8, 2) == features * 2**19
    unrolled = dataclasses.replace(RECIPE.compute, remat="none", scan_layers=False)
    assert costs.saved_bytes(dataclasses.replace(RECIPE, compute=unrolled), 8, 1) == 0, "the compiler may compute again"


def test_the_least_time_is_that_of_the_products_and_of_the_traffic_counted_by_hand() -> None:
    """6,738,415,616 weights, 2 x 32000 x 4096 of them outside the layers; 4,194,304 tokens a step."""
    compute = dataclasses.replace(RECIPE.compute, dtype="bfloat16")
    recipe = dataclasses.replace(RECIPE, batch=dataclasses.replace(RECIPE.batch, accumulation=2), compute=compute)
    products, traffic = costs.least_seconds(Job(topology("v4-512"), MeshShape(4, 64, 1), recipe))
    again = 2 * 32 * 4096 * (4 * 4096 + 2 * 11008)  # under `full` of each layer all matrices but the last
    of_model = RECIPE.model.train_flops_per_token(2048)
    assert products == pytest.approx(4194304 * (of_model + again) / 256 / (0.7 * 275e12))
    for remat, less in (("none", again), ("context", 0), ("qkv_context", 2 * 32 * 4096 * 3 * 4096)):
        one = dataclasses.replace(recipe, compute=dataclasses.replace(compute, remat=remat))
        seconds = costs.least_seconds(Job(topology("v4-512"), MeshShape(4, 64, 1), one))[0]
        assert seconds == pytest.approx(4194304 * (of_model + again - less) / 256 / (0.7 * 275e12))
    outside, weights = 2 * 32000 * 4096, 6_738_415_616
    gathers = 2 * (2 * (weights - outside) + outside) + weights  # two micro-batches; the gradient once
    assert traffic == pytest.approx(2 * gathers * 63 / 64 / 300e9)
    _, sharded = costs.least_seconds(Job(topology("v4-512"), MeshShape(2, 64, 2), recipe))
    sums = 32 * 4 * 2 * 4096 * 4194304 / 128 / 2  # an all-reduce goes round twice; of two devices half is sent
    assert sharded == pytest.approx(2 * (gathers / 2 * 63 / 64 + sums) / 300e9)


def searched(
    monkeypatch: pytest.MonkeyPatch, fits: Callable[[str, int], bool], seconds: float = 300.0
) -> tuple[list[search.Tried], list[tuple[MeshShape, int, str]], list[str]]:
    """What a search finds where policy and micro-batches fit by `fits`, what it compiled, and what it said."""
    compiled: list[tuple[MeshShape, int, str]] = []

    def compile_(job: Job) -> Compiled:
        assert job.recipe is not None
        remat, micro = job.recipe.compute.remat, job.recipe.batch.accumulation
        compiled.append((job.mesh, micro, remat))
        peak = 9 * GIB if fits(remat, micro) else 99 * GIB
        return step_of(job, peak=peak, products=2.2e17 if remat == "context" else 3e17)

    monkeypatch.setattr(search, "compiled", compile_)
    monkeypatch.setattr(search, "environment", lambda wanted: {})
    said: list[str] = []
    compute = dataclasses.replace(RECIPE.compute, dtype="bfloat16")
    recipe = dataclasses.replace(RECIPE, compute=compute)
    return search.search(Job(topology("v4-512"), MeshShape(), recipe), seconds, said.append), compiled, said


def test_a_search_compiles_what_may_fit_and_may_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = lambda remat, micro: remat in ("full", "offload") or (remat == "context" and micro > 1)
    found, compiled, said = searched(monkeypatch, fits)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert all(mesh.replica * mesh.fsdp * mesh.tensor == 256 for mesh, _, _ in compiled)
    on_one = {(micro, remat) for mesh, micro, remat in compiled if mesh == MeshShape(4, 64, 1)}
    # `none` in one micro-batch saves 56 GiB. `context` fits in two micro-batches: in more it has more traffic, and what
    # computes more again in two is slower. `offload` in one is behind `full`, which fits.
    assert (1, "none") not in on_one and (2, "context") in on_one
    assert not {(4, "context"), (8, "context"), (2, "full"), (1, "offload")} & on_one
    assert len(said) == len(compiled) + 1 and said[-1].startswith(f"compiled {len(compiled)}; ")
    assert "mesh 4,64,1, 2 micro-batches, context: 9.00 GiB, fits, a step in " in "\n".join(said)
    assert "mesh 4,64,1, 1 micro-batches, context: 99.00 GiB, does not fit" in said
    assert "GiB" in search.table(found)


def test_a_search_leaves_out_what_cannot_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one takes the least time of all: nothing else is compiled. Where it is twice that, other meshes are."""
    monkeypatch.setattr(search, "step_seconds", lambda step: 3.43)  # the products of the model alone take 3.51 s
    _, compiled, said = searched(monkeypatch, lambda remat, micro: True)
    assert len(compiled) == 1 and "cannot be faster" in said[-1]
    monkeypatch.setattr(search, "step_seconds", lambda step: 7.0)
    meshes = [mesh for mesh, _, _ in searched(monkeypatch, lambda remat, micro: True)[1]]
    assert len(set(meshes)) > 1 and len(meshes) < 24


def test_a_search_ends_in_time_and_says_what_it_has_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(search.time, "monotonic", lambda: next(clock))
    found, compiled, said = searched(monkeypatch, lambda remat, micro: True, seconds=40)
    assert len(compiled) == 4 and found
    assert re.search(r"compiled 4; .* \d+ were not tried in 40 s \(--search-seconds\)", said[-1])
    with pytest.raises(UserError, match="--search-seconds 40: nothing of 4 that were tried fits; give more"):
        searched(monkeypatch, lambda remat, micro: False, seconds=40)


def test_a_search_without_what_fits_says_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--topology v4-512: nothing fits; the least was 99.00 GiB; take more devices"):
        searched(monkeypatch, lambda remat, micro: False)

    def refused(job: Job) -> Compiled:
        raise UserError("mesh.fsdp=64 cannot be laid over these devices; choose other sizes")

    monkeypatch.setattr(search, "compiled", refused)
    with pytest.raises(UserError, match="cannot be laid over"):
        search.search(Job(topology("v4-512"), MeshShape(), RECIPE))


def test_groups_of_options_are_named() -> None:
    assert flags.flags_of("async_collectives", topology("v4-8")) == flags.TPU["async_collectives"]
    assert flags.flags_of("", topology("h100x8")) == {}
    with pytest.raises(UserError, match="--flags fast: no such group for h100x8; there is latency_hiding"):
        flags.flags_of("fast", topology("h100x8"))


def test_the_bytes_of_a_plan_are_those_of_the_buffers_and_a_full_one_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a compiler that dies behind its plan of the memory, as one that the machine has no memory for."""

    def dies(job: Job, folder: Path) -> str:
        (folder / "dump").mkdir()
        (folder / "dump" / "m.after_optimizations-memory-usage-report.txt").write_text("Total bytes: 4567666176 (4GiB)")
        (folder / "lowered.json").write_text('{"mesh": [4, 64, 1], "kinds": {}, "products": 1.0}')
        return "Killed"

    monkeypatch.setattr(compiling, "_run", dies)
    job = Job(topology("v4-512"), MeshShape(4, 64), RECIPE)
    assert compiling.compiled(job).peak == 4567666176
    with pytest.raises(UserError, match="--topology v4-512: the step was not compiled: Killed"):
        compiling.compiled(dataclasses.replace(job, full=True))


def test_a_plan_is_read_when_it_is_written_to_its_end(tmp_path: Path) -> None:
    """The module is there before the report of its memory, and either may be half written."""
    (tmp_path / "m.after_optimizations.txt").write_text("ENTRY %main {\n}\n")
    report = tmp_path / "m.after_optimizations-memory-usage-report.txt"
    for text in ("", "Memory Space: default (color=0)\nTotal by"):
        report.write_text(text)
        assert not compiling._is_planned(tmp_path)
    report.write_text("Memory Space: default (color=0)\nTotal bytes: 4567666176 (4.25GiB)\n")
    assert compiling._is_planned(tmp_path)
    (tmp_path / "m.after_optimizations.txt").write_text("ENTRY %main {\n  %a = f32[")
    assert not compiling._is_planned(tmp_path)
