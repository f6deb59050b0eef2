"""Linear layers and SwiGLU: the CPU's forms and the plain ones agree, each platform runs its own, parts are named."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fineline_jax import mesh
from fineline_jax.mesh import BATCH, make_mesh
from fineline_jax.models import attention, cpu_kernels, decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.sharding import HEADS, HIDDEN, STREAM
from fineline_jax.recipe import MeshShape

P = jax.P


def drawn(seed: int, shape: tuple[int, ...], spec: jax.P, dtype: Any) -> jax.Array:
    values = jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
    return jax.device_put(values, jax.NamedSharding(jax.sharding.get_mesh(), spec))


def plain_linears(subscripts: str, out: jax.P, x: jax.Array, weights: Any) -> tuple[jax.Array, ...]:
    return tuple(
        jnp.einsum(subscripts, x, cpu_kernels.gathered(weight, x.dtype), out_sharding=out) for weight in weights
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("branch", ["cpu", "accelerators"])
def test_the_written_forms_agree_with_the_plain_ones(
    axes: tuple[int, int, int], dtype: Any, branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The derivatives of the plain forms are JAX's own."""
    if branch == "accelerators":  # what would be compiled there
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    with jax.set_mesh(make_mesh(MeshShape(*axes), jax.devices()[: int(np.prod(axes))])):
        x = drawn(0, (4, 6, 8), STREAM, dtype)
        weights = tuple(drawn(1 + heads, (8, heads, 5), P("fsdp", "tensor", None), jnp.float32) for heads in (4, 2))
        slopes = tuple(drawn(5 + heads, (4, 6, heads, 5), HEADS, dtype) for heads in (4, 2))
        both = [
            jax.jit(lambda x, w, s, form=form: jax.vjp(lambda *a: form("bsd,dhk->bshk", HEADS, *a), x, w)[1](s))(
                x, weights, slopes
            )
            for form in (cpu_kernels.linears, plain_linears)
        ]
        gate, up, slope = (drawn(seed, (4, 6, 8), HIDDEN, dtype) for seed in (10, 11, 12))
        for form in (cpu_kernels.swiglu, cpu_kernels.plain_swiglu):
            both.append(jax.jit(lambda g, u, s, form=form: jax.vjp(form, g, u)[1](s))(gate, up, slope))
            both.append(jax.jit(form)(gate, up))
        pairs = zip(jax.tree.leaves((both[0], *both[2:4])), jax.tree.leaves((both[1], *both[4:6])), strict=True)
    bound = 1e-5 if dtype == jnp.float32 else 2**-6
    for ours, plain in pairs:
        assert ours.dtype == plain.dtype and ours.sharding == plain.sharding
        ours, plain = (np.asarray(array, np.float64) for array in (ours, plain))
        np.testing.assert_allclose(ours, plain, atol=bound * np.abs(plain).max())


@pytest.mark.parametrize(
    ("subscripts", "x", "weight", "out"),
    [
        ("bshk,hkd->bsd", (HEADS, (4, 6, 4, 2)), (P("tensor", None, "fsdp"), (4, 2, 8)), STREAM),
        ("bsf,fd->bsd", (HIDDEN, (4, 6, 8)), (P("tensor", "fsdp"), (8, 8)), STREAM),
        ("bsf,fr->bsr", (HIDDEN, (4, 6, 8)), (P("tensor", None), (8, 3)), STREAM),
    ],
)
@pytest.mark.parametrize("axes", [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_the_gradient_of_a_weight_is_scattered_over_whichever_axis_is_split(
    axes: tuple[int, int, int], subscripts: str, x: Any, weight: Any, out: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in two stages, where the sum is over all devices, as on TPUs."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    monkeypatch.setattr(mesh, "second_stage", lambda kind, devices: 2)
    with jax.set_mesh(make_mesh(MeshShape(*axes), jax.devices()[: int(np.prod(axes))])):
        rows = 8 if axes[1] == 8 else 4
        inputs = drawn(0, (rows, *x[1][1:]), x[0], jnp.float32), drawn(1, weight[1], weight[0], jnp.float32)

        def gradients(form: Callable) -> Any:
            run = lambda x, w: jnp.sum(jnp.sin(form(subscripts, out, x, (w,))[0]))
            return jax.jit(jax.grad(run, argnums=(0, 1)))(*inputs)

        for ours, plain in zip(gradients(cpu_kernels.linears), gradients(plain_linears), strict=True):
            assert ours.sharding == plain.sharding
            np.testing.assert_allclose(ours, plain, atol=1e-5 * np.abs(plain).max())


def lowered(function: Callable, platform: str, *arrays: jax.Array) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_a_cpu_runs_the_forms_that_are_written_for_it(platform: str) -> None:
    """Which holds barriers and products of outputs side by side; the plain derivatives hold neither."""
    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        x, gate, up = (drawn(seed, (4, 6, 8), STREAM, jnp.float32) for seed in range(3))
        weights = tuple(drawn(seed, (8, 2, 4), P(None, "tensor", None), jnp.float32) for seed in range(2))
        linears = lambda x, w: sum(jnp.sum(jnp.sin(y)) for y in cpu_kernels.linears("bsd,dhk->bshk", HEADS, x, w))
        gradients = lowered(jax.grad(linears, argnums=(0, 1)), platform, x, weights)
        gate_gradients = lowered(jax.grad(lambda g, u: jnp.sum(cpu_kernels.swiglu(g, u) ** 2)), platform, gate, up)
        forward = lowered(cpu_kernels.swiglu, platform, gate, up)
        plain_forward = lowered(cpu_kernels.plain_swiglu, platform, gate, up)
    own = platform == "cpu"
    assert ("stablehlo.concatenate" in gradients) == own
    assert ("optimization_barrier" in gate_gradients) == own
    operations = lambda text: sorted(re.findall(r"stablehlo\.(?!case|return|constant)\w+", text))
    assert (operations(forward) == operations(plain_forward)) == (not own)


@pytest.mark.parametrize("kind", ["dense", "experts", "mamba"])
def test_the_program_names_its_parts_for_a_profile(kind: str) -> None:
    """In the metadata of what is computed, forward and backward."""
    dense = ModelConfig(32, 8, 2, 2, 16, head="normalised")
    config = {
        "dense": dense,
        "experts": dataclasses.replace(dense, experts=2, experts_per_token=1),
        "mamba": ModelConfig(
            32, 8, 2, 0, 16, mixer="mamba", state_size=2, conv_width=2, step_rank=1, tied_embeddings=True
        ),
    }[kind]
    one = make_mesh(MeshShape(), jax.devices()[:1])

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        states = decoder.hidden_states(config, params, tokens, tokens, attention.causal("xla"))
        return jnp.sum(jnp.einsum("bsd,dv->bsv", states, decoder.head_weight(config, params), out_sharding=STREAM))

    with jax.set_mesh(one):
        tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32, sharding=jax.NamedSharding(one, P(BATCH, None)))
        program = jax.jit(jax.grad(loss)).lower(decoder.abstract_params(config, one), tokens)
    text = program.as_text(debug_info=True)
    names = [set(re.split(r"[/()]", name)) for name in re.findall(r'loc\("([^"]*)"', text)]
    layer = {"mamba"} if kind == "mamba" else {"attention", "mlp"}
    for part in {"embed", "norm", "head", *layer}:
        assert any(part in name for name in names), part
    for part in layer if kind != "experts" else {"attention"}:
        assert any({part, "tx,ty->xy"} <= name for name in names), f"the gradients of the weights of {part}"
