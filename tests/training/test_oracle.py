"""Training steps against torch: Hugging Face's model, torch's AdamW, the rest from the definitions (torch_steps)."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from torch_steps import Peer, Step, differing, learning_rate

from fineline_jax.mesh import make_mesh
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Compute, Data, Loss, MeshShape, Optimizer, Recipe, Schedule, Source
from fineline_jax.training import step as training_step
from fineline_jax.training.schedule import rates
from fineline_jax.training.step import BATCH_SPEC, abstract_state, make_train_step, make_validation_step, padded_rows

BOS = 1
SEQUENCES, LENGTH = 16, 11
TOKENS = SEQUENCES * LENGTH
# No value is a default. eps is as large as the gradients, else Adam would forgive any scale of theirs; one step of the
# four is clipped.
OPTIMIZER = Optimizer(
    Schedule(peak=0.1, final=0.01, warmup_tokens=3 * TOKENS // 2),
    beta1=0.8, beta2=0.9, eps=0.02, weight_decay=0.3, decay="all", clip_norm=2.0,
)  # fmt: skip
RECIPE = Recipe(
    name="small",
    model=ModelConfig(vocab_size=60, width=16, layers=2, heads=4, mlp_width=24, context=16, norm_eps=1e-5),
    data=Data((Source("random"),), sequence_length=LENGTH),
    batch=Batch(SEQUENCES),
    optimizer=OPTIMIZER,
    tokens=6 * TOKENS + 5,
    loss=Loss(ignore_token=BOS, z_loss=0.02, chunk_tokens=7),
    compute=Compute(dtype="float32", remat="none"),
)


def mesh_of(replica: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return make_mesh(MeshShape(replica, fsdp, tensor), jax.devices()[: replica * fsdp * tensor])


@functools.cache
def start_of(model: ModelConfig) -> dict:
    """Parameters with no two alike, scales of norms too, large enough that neither attention nor routers are even."""
    mesh, random = mesh_of(1, 1, 1), np.random.default_rng(0)
    target = abstract_state(dataclasses.replace(RECIPE, model=model), mesh)["params"]

    def draw(path, leaf):
        name = path[-1].key
        drawn = (2.0 if name == "router" else 0.3) * random.standard_normal(leaf.shape)
        return (drawn + name.endswith("norm")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, target)


def windows_of(step: int) -> np.ndarray:
    """The last rows hold more of BOS than the first, so that micro-batches train on unequal counts; from step 3 on
    there is nothing else to predict."""
    random = np.random.default_rng(step)
    windows = random.integers(2, RECIPE.model.vocab_size, (SEQUENCES, LENGTH + 1), dtype=np.int32)
    share = np.linspace(0, 0.95, SEQUENCES)[:, None] if step < 3 else 1.0
    windows[:, 1:][random.random((SEQUENCES, LENGTH)) < share] = BOS
    return windows


@functools.cache
def peer_steps(decay: str, folder) -> list[Step]:
    peer = Peer(with_(decay=decay), start_of(RECIPE.model), folder / decay)
    return [peer.step(windows_of(step), step) for step in range(4)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("peers")
    return lambda decay="all": peer_steps(decay, folder)


def state_of(recipe: Recipe, mesh: jax.sharding.Mesh) -> dict:
    target = abstract_state(recipe, mesh)
    zeros = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), target)
    place = lambda value, leaf: jax.device_put(value, leaf.sharding)
    return {**zeros, "params": jax.tree.map(place, start_of(recipe.model), target["params"])}


@functools.cache
def compiled(recipe: Recipe, axes: tuple[int, int, int]):
    mesh = mesh_of(*axes)
    with jax.set_mesh(mesh):
        shape = padded_rows(SEQUENCES, recipe, mesh), LENGTH + 1
        windows = jax.ShapeDtypeStruct(shape, np.int32, sharding=jax.NamedSharding(mesh, BATCH_SPEC))
        arguments = abstract_state(recipe, mesh), windows, np.float32(0), np.float32(0)
        return jax.jit(make_train_step(recipe, mesh)).lower(*arguments).compile()


def placed(windows: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    return jax.device_put(windows, jax.NamedSharding(mesh, BATCH_SPEC))


def trained(recipe: Recipe, axes: tuple[int, int, int], steps: int):
    """(metrics, parameters) after each step."""
    mesh = mesh_of(*axes)
    with jax.set_mesh(mesh):
        state, step = state_of(recipe, mesh), compiled(recipe, axes)
        for index in range(steps):
            scalars = rates(recipe, index * recipe.tokens_per_step)
            filler = padded_rows(SEQUENCES, recipe, mesh) - SEQUENCES
            windows = np.pad(windows_of(index), ((0, filler), (0, 0)), constant_values=-1)
            state, metrics = step(state, placed(windows, mesh), *scalars)
            assert {(value.dtype, value.shape) for value in metrics.values()} == {(np.dtype(np.float32), ())}
            yield {name: float(value) for name, value in metrics.items()}, jax.tree.map(np.asarray, state["params"])


def with_(recipe: Recipe = RECIPE, *, accumulation: int = 1, dtype="float32", **optimizer) -> Recipe:
    return dataclasses.replace(
        recipe,
        batch=Batch(SEQUENCES, accumulation),
        optimizer=dataclasses.replace(OPTIMIZER, **optimizer),
        compute=Compute(dtype=dtype, remat="none"),
    )


SKIPPING = with_(accumulation=2, decay="matrices", skip_nonfinite=True)


def test_steps_of_plain_gradient_descent_are_those_of_torch(tmp_path, monkeypatch):
    """Which forgive no scale of the gradient at all."""
    recipe = dataclasses.replace(with_(accumulation=2), name="plain")
    descent = optax.with_extra_args_support(optax.clip_by_global_norm(OPTIMIZER.clip_norm))
    monkeypatch.setattr(training_step, "make_optimizer", lambda *_: descent)
    peer = Peer(recipe, start_of(recipe.model), tmp_path / "peer", plain=True)
    for index, (metrics, params) in enumerate(trained(recipe, (1, 8, 1), 3)):
        theirs = peer.step(windows_of(index), index)
        for name in ("loss", "gradient_norm", "update_norm", "learning_rate", "trained_tokens"):
            assert metrics[name] == pytest.approx(getattr(theirs, name), rel=1e-5), name
        assert not differing(params, theirs.params, 1e-5)


@pytest.mark.parametrize(
    ("recipe", "axes"),
    [
        (with_(), (1, 1, 1)),
        (SKIPPING, (1, 1, 1)),
        (with_(accumulation=2), (1, 8, 1)),
        pytest.param(with_(accumulation=4), (2, 2, 2), marks=pytest.mark.slow),
        pytest.param(with_(decay="matrices"), (1, 4, 2), marks=pytest.mark.slow),
        (with_(accumulation=4, decay="matrices"), (1, 2, 4)),
        pytest.param(with_(), (3, 2, 1), marks=pytest.mark.slow),  # 16 windows in 18 rows
        (with_(accumulation=2), (3, 2, 1)),  # in 24
    ],
    ids=[
        "one-device",
        "in-two-parts",
        "eight-shards-in-two",
        "every-axis-in-four",
        "two-axes",
        "tensor-of-four-in-four",
        "filled-up",
        "filled-up-in-two-parts",
    ],
)
def test_steps_are_those_of_torch_on_any_mesh_and_in_any_number_of_micro_batches(recipe, axes, expected, capfd):
    """The last of the four has nothing to train on: its update is the moments' and the decay's."""
    steps = trained(recipe, axes, 4)
    for (metrics, params), theirs in zip(steps, expected(recipe.optimizer.decay), strict=True):
        for name in ("loss", "gradient_norm", "update_norm", "learning_rate", "trained_tokens"):
            assert metrics[name] == pytest.approx(getattr(theirs, name), rel=2e-6, abs=1e-12), name
        assert not differing(params, theirs.params, 2e-6)
    assert "rematerialization" not in capfd.readouterr().err


MIXTURE = dataclasses.replace(
    RECIPE,
    model=dataclasses.replace(RECIPE.model, mlp_width=8, qk_norm=True, experts=6, experts_per_token=2),
    loss=dataclasses.replace(RECIPE.loss, load_balance=0.3, router_z_loss=0.05),
)


@pytest.mark.parametrize(
    ("axes", "parts"),
    [
        ((1, 1, 1), [range(16)]),
        ((2, 2, 2), [(0, 1, 4, 5, 8, 9, 12, 13), (2, 3, 6, 7, 10, 11, 14, 15)]),  # of each device's rows a half
    ],
    ids=["one-device", "every-axis-in-two-parts"],
)
def test_the_losses_of_routers_are_those_of_transformers_and_count_as_means_over_micro_batches(axes, parts, tmp_path):
    """Means over all tokens, those too whose targets are not trained on; the logged loss is without them."""
    recipe = with_(MIXTURE, accumulation=len(parts))

    def of_routers(output):
        squares = sum(logits.logsumexp(-1).square().mean() for logits in output.router_logits)
        return 0.3 * output.aux_loss + 0.05 * squares / recipe.model.layers

    peer = Peer(recipe, start_of(recipe.model), tmp_path / "peer", router_losses=of_routers)
    for index, (metrics, params) in enumerate(trained(recipe, axes, 3)):
        theirs = peer.step(windows_of(index), index, parts)
        for name in ("loss", "gradient_norm", "update_norm"):
            assert metrics[name] == pytest.approx(getattr(theirs, name), rel=5e-6, abs=1e-12), name
        assert not differing(params, theirs.params, 5e-6)


def test_a_step_that_is_skipped_changes_nothing_and_is_counted_until_the_end():
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        state, step = state_of(SKIPPING, mesh), compiled(SKIPPING, (1, 1, 1))
        state, metrics = step(state, placed(windows_of(1), mesh), *rates(SKIPPING, SKIPPING.tokens_per_step))
        assert metrics["skipped"] == 0 < metrics["update_norm"] and metrics["gradient_norm"] > OPTIMIZER.clip_norm
        seen = state["opt_state"]
        assert (seen.losses[0], seen.norms[0]) == (metrics["loss"], metrics["gradient_norm"]), "what spikes are seen in"
        good = windows_of(0)
        good[good == 7] = 8
        bad = good.copy()
        bad[3, 5] = 7
        embed = np.array(state["params"]["embed"])
        embed[7] = np.inf  # only `bad` looks there
        state["params"]["embed"] = jax.device_put(embed, state["params"]["embed"].sharding)
        after, metrics = step(state, placed(bad, mesh), *rates(SKIPPING, 2 * SKIPPING.tokens_per_step))
        jax.tree.map(np.testing.assert_array_equal, after["params"], state["params"])
        jax.tree.map(np.testing.assert_array_equal, after["opt_state"].inner, state["opt_state"].inner)
        assert (metrics["skipped"], metrics["update_norm"]) == (1, 0)
        assert metrics["learning_rate"] == pytest.approx(learning_rate(SKIPPING, 2)), "skipped steps count for the rate"
        after, metrics = step(after, placed(good, mesh), *rates(SKIPPING, 3 * SKIPPING.tokens_per_step))
        assert metrics["skipped"] == 1
        assert np.all(np.asarray(after["params"]["head"]) != np.asarray(state["params"]["head"]))


def test_in_bfloat16_the_losses_are_near_and_masters_and_moments_stay_float32(expected):
    recipe = with_(dtype="bfloat16")
    assert "bf16[" in compiled(recipe, (1, 1, 1)).as_text(), "nothing is computed in bfloat16"
    for (metrics, params), theirs in zip(trained(recipe, (1, 1, 1), 3), expected()[:3], strict=True):
        assert 1e-6 < abs(metrics["loss"] / theirs.loss - 1) < 2e-3
        assert metrics["gradient_norm"] == pytest.approx(theirs.gradient_norm, rel=1e-2)
        for ours, exact in zip(jax.tree.leaves(params), jax.tree.leaves(theirs.params), strict=True):
            assert ours.dtype == np.float32
            assert np.linalg.norm(ours - exact) <= 0.05 * np.linalg.norm(exact)
            assert np.any(ours != ours.astype("bfloat16")), "the masters were rounded"


class DocumentsAlone(Peer):
    """Each document of a window is a sequence of its own, with positions from 0."""

    def sums(self, windows: np.ndarray) -> tuple[Any, Any, Any]:
        with_z, plain, output = 0.0, 0.0, None
        for row in windows:
            start = 0
            for place in range(LENGTH):
                if row[place] == BOS or place == LENGTH - 1:
                    of_one, plain_of_one, output = super().sums(row[None, start : place + 2])
                    with_z, plain, start = with_z + of_one, plain + plain_of_one, place + 1
        return with_z, plain, output


def test_masked_documents_are_trained_on_as_if_each_were_alone(tmp_path):
    """The last token of a document still predicts the first of the next."""
    data = dataclasses.replace(RECIPE.data, mask_documents_at=BOS)
    recipe = dataclasses.replace(with_(accumulation=2), data=data)
    alone = DocumentsAlone(recipe, start_of(recipe.model), tmp_path / "peer")
    assert (windows_of(1)[:, :-1] == BOS).sum() > 3 * SEQUENCES
    for index, (metrics, params) in enumerate(trained(recipe, (2, 2, 2), 3)):
        theirs = alone.step(windows_of(index), index)
        assert metrics["loss"] == pytest.approx(theirs.loss, rel=1e-5)
        assert metrics["gradient_norm"] == pytest.approx(theirs.gradient_norm, rel=1e-5)
        assert metrics["trained_tokens"] == theirs.trained_tokens
        assert not differing(params, theirs.params, 1e-5)


def test_the_validation_loss_is_the_sum_of_plain_cross_entropies_and_the_number_of_targets(tmp_path):
    mesh, peer = mesh_of(2, 2, 2), Peer(RECIPE, start_of(RECIPE.model), tmp_path / "peer")
    everything = np.ones(SEQUENCES, np.float32)
    with jax.set_mesh(mesh):
        params, step = state_of(RECIPE, mesh)["params"], jax.jit(make_validation_step(RECIPE, mesh))
        for index, count in ((0, 98), (1, 91), (3, 0)):
            loss, targets = step(params, *weighted(windows_of(index), everything, mesh))
            assert float(loss) == pytest.approx(peer.sums(windows_of(index))[1].item(), rel=1e-6)
            assert float(targets) == count


def weighted(windows: np.ndarray, weights: np.ndarray, mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
    return placed(windows, mesh), jax.device_put(weights, jax.NamedSharding(mesh, jax.P(BATCH_SPEC[0])))


@pytest.mark.parametrize(("axes", "rows"), [((1, 1, 1), 3), ((1, 1, 1), 24), ((2, 2, 2), 4), ((1, 8, 1), 16)])
def test_the_validation_loss_of_the_same_windows_is_the_same_for_any_batch_and_mesh(tmp_path, axes, rows):
    """Rows that fill up the last batch do not count, whatever is in them."""
    peer = Peer(RECIPE, start_of(RECIPE.model), tmp_path / "peer")
    windows = np.concatenate([windows_of(index) for index in range(3)])[:17]
    expected, count = 0.0, int((windows[:, 1:] != BOS).sum())
    for start in range(0, 17, SEQUENCES):
        expected += peer.sums(windows[start : start + SEQUENCES])[1].item()
    filled = np.full((-(-17 // rows) * rows, LENGTH + 1), 7, np.int32)
    filled[:17] = windows
    weights = (np.arange(len(filled)) < 17).astype(np.float32)
    mesh, loss, targets = mesh_of(*axes), 0.0, 0.0
    with jax.set_mesh(mesh):
        params, step = state_of(RECIPE, mesh)["params"], jax.jit(make_validation_step(RECIPE, mesh))
        for start in range(0, len(filled), rows):
            batch = slice(start, start + rows)
            sums = step(params, *weighted(filled[batch], weights[batch], mesh))
            loss, targets = loss + float(sums[0]), targets + float(sums[1])
    assert loss == pytest.approx(expected, rel=1e-6) and targets == count
