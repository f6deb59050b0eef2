"""The losses of routers: transformers' values and gradients, on any mesh, whole and in parts of a batch."""

import dataclasses
from pathlib import Path
from typing import Any

import family_examples
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fineline_jax.checkpoints import hub
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models import attention, decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Compute, Data, Loss, Mesh, Optimizer, Recipe, Schedule, Source, check
from fineline_jax.training.step import BATCH_SPEC, initial_state, make_train_step, router_losses

TOKENS = np.random.default_rng(1).integers(0, family_examples.VOCABULARY, (4, 20), dtype=np.int32)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("olmoe") / "hf"
    return folder, family_examples.make("olmoe", folder)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=["one device", "eight devices"])
@pytest.mark.parametrize("kind", ["load_balance", "router_z_loss"])
def test_the_losses_of_the_routers_and_their_gradients_are_those_of_transformers(olmoe, shape, kind) -> None:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    folder, model = olmoe
    model.zero_grad()
    out = model(torch.asarray(TOKENS, dtype=torch.long), output_router_logits=True)
    if kind == "load_balance":
        theirs = out.aux_loss  # transformers' load_balancing_loss_func
    else:
        theirs = torch.cat(out.router_logits).logsumexp(-1).square().mean()
    theirs.backward()

    mesh = make_mesh(Mesh(*shape), jax.devices()[: int(np.prod(shape))])
    config, params = hub.load_hf(folder, mesh)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape, out_sharding=BATCH_SPEC)
        attend = attention.causal("reference")
        _, routing = decoder.hidden_states_and_routing(config, params, tokens, positions, attend, remat="full")
        return router_losses(dataclasses.replace(Loss(), **{kind: 0.5}), routing, tokens.size)

    with jax.set_mesh(mesh):
        tokens = jax.device_put(TOKENS, jax.NamedSharding(mesh, BATCH_SPEC))
        ours, gradients = jax.jit(jax.value_and_grad(loss))(params, tokens)
    np.testing.assert_allclose(2 * ours, theirs.item(), rtol=1e-5)
    state = dict(model.named_parameters())
    for layer in range(config.layers):
        for found, peer in (("router", "mlp.gate"), ("o", "self_attn.o_proj")):
            expected = state[f"model.layers.{layer}.{peer}.weight"].grad
            if expected is None:  # nothing behind the last router counts
                continue
            found = np.asarray(gradients["layers"][found][layer])
            expected = expected.numpy().T.reshape(found.shape)
            np.testing.assert_allclose(2 * found, expected, atol=1e-5 * np.abs(expected).max())
    embedding = state["model.embed_tokens.weight"].grad.numpy()
    np.testing.assert_allclose(2 * np.asarray(gradients["embed"]), embedding, atol=1e-5 * np.abs(embedding).max())


def recipe_of(model: ModelConfig, **loss: float) -> Recipe:
    return Recipe(
        name="small",
        model=model,
        data=Data((Source("random"),), sequence_length=24),
        batch=Batch(8),
        optimizer=Optimizer(Schedule(peak=1e-2)),
        tokens=8 * 24 * 40,
        loss=Loss(**loss),  # type: ignore[arg-type]
        compute=Compute(dtype="float32"),
    )


MODEL = ModelConfig(vocab_size=64, width=16, layers=2, heads=2, mlp_width=16, experts=8, experts_per_token=2)


@jax.jit
def routing_of(params: Any, tokens: jax.Array) -> Any:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = attention.causal("reference")
    return decoder.hidden_states_and_routing(MODEL, params, tokens, positions, attend)[1]


def test_training_with_the_loss_evens_out_the_use_of_experts() -> None:
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    uneven = []
    for weight in (0.0, 1.0):
        recipe = recipe_of(MODEL, load_balance=weight)
        with jax.set_mesh(mesh):
            state = jax.jit(lambda recipe=recipe: initial_state(recipe))()
            state["params"]["layers"]["router"] *= 50  # far from even
            step = jax.jit(make_train_step(recipe, mesh), donate_argnums=0)
            for index in range(40):
                windows = np.random.default_rng(index).integers(0, 64, (8, 25), dtype=np.int32)
                state, _ = step(state, jax.device_put(windows, jax.NamedSharding(mesh, BATCH_SPEC)), np.int32(index))
            routing = routing_of(state["params"], jnp.asarray(windows[:, :-1]))
        assert float(routing.chosen.sum()) == MODEL.layers * MODEL.experts_per_token * 8 * 24
        uneven.append(float(jnp.std(routing.chosen)))
    assert uneven[1] < 0.7 * uneven[0]


def test_parts_of_a_batch_count_by_their_share() -> None:
    """The loss of a batch in two equal halves is the mean of theirs: doubled windows give what one half gives."""
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    half = np.random.default_rng(0).integers(0, 64, (4, 25), dtype=np.int32)
    norms = []
    for windows, accumulation in ((half, 1), (np.concatenate([half, half]), 2)):
        recipe = dataclasses.replace(
            recipe_of(MODEL, load_balance=0.5, router_z_loss=0.1), batch=Batch(len(windows), accumulation)
        )
        with jax.set_mesh(mesh):
            state = jax.jit(lambda recipe=recipe: initial_state(recipe))()
            placed = jax.device_put(windows, jax.NamedSharding(mesh, BATCH_SPEC))
            _, metrics = jax.jit(make_train_step(recipe, mesh))(state, placed, np.int32(0))
        norms.append((float(metrics["gradient_norm"]), float(metrics["loss"])))
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)


def test_losses_of_routers_need_experts() -> None:
    dense = dataclasses.replace(MODEL, experts=0, experts_per_token=0)
    with pytest.raises(UserError, match=r"loss\.load_balance=0\.01 is a loss of experts; set model\.experts"):
        check(recipe_of(dense, load_balance=0.01))
    with pytest.raises(UserError, match=r"loss\.router_z_loss"):
        check(recipe_of(MODEL, router_z_loss=-1.0))
    check(recipe_of(MODEL, load_balance=0.01, router_z_loss=0.001))
