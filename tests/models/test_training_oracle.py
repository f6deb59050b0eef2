"""Three optimizer steps of mixtures and of Mamba: losses, gradients and weights as torch has them."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Compute, Data, Loss, MeshShape, Optimizer, Recipe, Schedule, Source
from fineline_jax.training.optimizer import make_optimizer
from fineline_jax.training.schedule import rates
from fineline_jax.training.step import BATCH_SPEC, make_train_step

PLAIN = ModelConfig(
    vocab_size=40, width=16, layers=2, heads=4, mlp_width=12, context=16, init_std=0.3, norm_eps=0.02, rope_theta=100.0
)
MODELS = {
    "olmoe": dataclasses.replace(PLAIN, qk_norm=True, clip_qkv=0.7, experts=6, experts_per_token=2),
    "qwen2_moe": dataclasses.replace(
        PLAIN, kv_heads=2, qkv_bias=True, experts=5, experts_per_token=3, normalise_experts=True, shared_expert_width=10
    ),
    "mamba": ModelConfig(
        vocab_size=40, width=16, layers=2, heads=0, mlp_width=24, context=16, tied_embeddings=True, mixer="mamba",
        state_size=3, conv_width=3, step_rank=2, init_std=0.3, norm_eps=0.02,
    ),
    "olmo_hybrid": dataclasses.replace(
        PLAIN, layers=4, kv_heads=2, norm_after=True, qk_norm=True, mixer="gated_delta", attention_layers=(1, 3),
        inner_width=12, state_size=6, state_heads=4, state_groups=2, conv_width=3, negative_eigenvalues=True,
        state_norm_eps=1e-5,
    ),
}  # fmt: skip


def recipe_of(model: ModelConfig, loss: Loss) -> Recipe:
    return Recipe(
        name="small",
        model=model,
        data=Data((Source("random"),), sequence_length=13),
        batch=Batch(3),
        # An eps of the size of the gradients, without which Adam would forgive any factor of theirs.
        optimizer=Optimizer(Schedule(peak=2e-2, final=1e-3), eps=1e-2, clip_norm=1e6, decay="matrices"),
        tokens=3 * 3 * 13,
        loss=loss,
        compute=Compute(dtype="float32", remat="none"),
    )


def router_losses(loss: Loss, experts: int, per_token: int):
    """2101.03961, equations 4 to 6, and 2202.08906, equation 5, over all layers at once."""
    torch = pytest.importorskip("torch")

    def of(output: Any) -> Any:
        logits = torch.cat([layer.reshape(-1, experts) for layer in output.router_logits]).double()
        probability = logits.exp() / logits.exp().sum(-1, keepdim=True)
        sent = torch.zeros_like(logits).scatter(-1, logits.topk(per_token).indices, 1.0)
        balance = experts * (sent.mean(0) * probability.mean(0)).sum()
        return loss.load_balance * balance + loss.router_z_loss * (logits.exp().sum(-1).log() ** 2).mean()

    return of


@pytest.mark.parametrize(
    "name", [name if name in ("olmoe", "mamba") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_three_steps_change_every_weight_as_torch_does(name: str, tmp_path) -> None:
    pytest.importorskip("torch")
    from torch_steps import Peer, differing

    model = MODELS[name]
    of_router = dict(load_balance=0.3, router_z_loss=0.05) if model.experts else {}
    recipe = recipe_of(model, Loss(z_loss=1e-2, chunk_tokens=16, **of_router))
    mesh, random = make_mesh(MeshShape(), jax.devices()[:1]), np.random.default_rng(5)
    with jax.set_mesh(mesh):
        # All of the same size: ones and zeros would hide a mistake, and routers near even be decided by rounding.
        draw = lambda leaf: jax.device_put(np.float32(0.35 * random.normal(size=leaf.shape)), leaf.sharding)
        params = jax.tree.map(draw, decoder.abstract_params(model, mesh))
        state = {"params": params, "opt_state": jax.jit(make_optimizer(recipe.optimizer).init)(params)}
        losses_of_router = router_losses(recipe.loss, model.experts, model.experts_per_token) if model.experts else None
        peer = Peer(recipe, state["params"], tmp_path / "peer", family=name, router_losses=losses_of_router)
        step = jax.jit(make_train_step(recipe, mesh))
        before = jax.tree.map(np.zeros_like, state["params"])
        for index in range(3):
            windows = random.integers(0, model.vocab_size, (3, 14), dtype=np.int32)
            expected = peer.step(windows, index)
            placed = jax.device_put(windows, jax.NamedSharding(mesh, BATCH_SPEC))
            state, metrics = step(state, placed, *rates(recipe, index * recipe.tokens_per_step))
            np.testing.assert_allclose(metrics["loss"], expected.loss, rtol=2e-6)
            np.testing.assert_allclose(metrics["gradient_norm"], expected.gradient_norm, rtol=2e-5)
            [mu] = [jax.tree.map(np.asarray, part.mu) for part in state["opt_state"] if hasattr(part, "mu")]
            gradients = jax.tree.map(lambda new, old: (new - 0.9 * old) / 0.1, mu, before)  # beta1 is 0.9
            # What a hybrid reads from its states, often near 0, is divided by its size: rounding errors with it.
            loose = 5 if name == "olmo_hybrid" else 1
            assert not differing(gradients, expected.gradients, loose * 1e-4)
            assert not differing(state["params"], expected.params, loose * 2e-5)
            before = mu
