"""The decoder: sizes as published, logits as transformers', the same on any mesh and under any remat policy."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import example, given, settings
from hypothesis import strategies as st
from profiles import COMPILES

from fineline_jax.errors import UserError
from fineline_jax.mesh import BATCH, make_mesh
from fineline_jax.models import attention, cpu_kernels, decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import MeshShape

SMALL = ModelConfig(
    vocab_size=96, width=32, layers=3, heads=4, kv_heads=2, mlp_width=64, context=32, attention_bias=True, mlp_bias=True
)


def hidden(config, mesh, tokens, *, dtype=jnp.float32, gradients=True, **options):
    """Hidden states, and gradients of the mean of their cubes if asked for, on `mesh`, as numpy."""
    random = np.random.default_rng(0)
    draw = lambda leaf: jax.device_put(np.float32(0.15 * random.normal(size=leaf.shape)), leaf.sharding)
    with jax.set_mesh(mesh):
        params = jax.tree.map(draw, decoder.abstract_params(config, mesh))
        place = jax.NamedSharding(mesh, jax.P(BATCH, None))
        tokens = jax.device_put(tokens, place)
        positions = jax.device_put(np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), place)
        attend = attention.causal("xla")

        def loss(params):
            states = decoder.hidden_states(config, params, tokens, positions, attend, dtype=dtype, **options)
            return jnp.mean(states.astype(jnp.float32) ** 3), states

        if not gradients:
            return np.asarray(jax.jit(loss)(params)[1]), None
        (_, states), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return np.asarray(states), jax.tree.map(np.asarray, slopes)


def close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-6))


def tokens_of(config, rows=8, length=24):
    return np.random.default_rng(1).integers(0, config.vocab_size, (rows, length), dtype=np.int32)


MAMBA = ModelConfig(
    vocab_size=96,
    width=32,
    layers=3,
    heads=0,
    mlp_width=64,
    context=32,
    mixer="mamba",
    state_size=4,
    conv_width=4,
    step_rank=2,
)


@pytest.mark.parametrize(
    ("config", "axes"),
    [
        (SMALL, (1, 1, 1)),
        (SMALL, (2, 2, 2)),
        (dataclasses.replace(SMALL, norm_after=True), (2, 2, 2)),
        (dataclasses.replace(SMALL, parallel_residual=True, layers=1), (2, 2, 2)),
        (dataclasses.replace(SMALL, experts=4, experts_per_token=2, mlp_bias=False, layers=2), (2, 2, 2)),
        (dataclasses.replace(MAMBA, layers=2), (2, 2, 2)),
    ],
)
def test_activations_at_some_places_are_those_of_all_places(config, axes):
    mesh = make_mesh(MeshShape(*axes), jax.devices()[: np.prod(axes)])
    shards = axes[0] * axes[1]
    tokens = tokens_of(config)
    places = np.random.default_rng(2).integers(0, 8 * 24 // shards, (shards, 11), dtype=np.int32)
    places = jax.device_put(places, jax.NamedSharding(mesh, jax.P(BATCH, None)))
    everywhere, _ = hidden(config, mesh, tokens, gradients=False)
    found, _ = hidden(config, mesh, tokens, gradients=False, flat_index=places)
    places = np.asarray(places)
    expected = np.take_along_axis(everywhere.reshape(shards, -1, config.width), places[:, :, None], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_amber_7b_has_exactly_its_published_number_of_parameters():
    amber = ModelConfig(vocab_size=32_000, width=4096, layers=32, heads=32, mlp_width=11_008)
    assert amber.parameters == 6_738_415_616
    mesh = make_mesh(MeshShape(fsdp=1), jax.devices()[:1])
    shapes = decoder.abstract_params(amber, mesh)
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == amber.parameters


@given(
    heads=st.sampled_from([2, 4]),
    groups=st.sampled_from([1, 2]),
    tied=st.booleans(),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    layers=st.integers(1, 3),
)
@example(heads=4, groups=2, tied=True, attention_bias=True, mlp_bias=True, layers=3)
@settings(parent=COMPILES, max_examples=8)
def test_parameter_count_is_that_of_the_arrays(heads, groups, tied, attention_bias, mlp_bias, layers):
    config = ModelConfig(
        vocab_size=40,
        width=16,
        layers=layers,
        heads=heads,
        kv_heads=heads // groups,
        mlp_width=24,
        tied_embeddings=tied,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )
    shapes = decoder.abstract_params(config, make_mesh(MeshShape(fsdp=1), jax.devices()[:1]))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == config.parameters


@functools.cache
def of_small(*axes):
    return hidden(SMALL, make_mesh(MeshShape(*axes), jax.devices()[: np.prod(axes)]), tokens_of(SMALL))


@pytest.mark.parametrize("axes", [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_any_mesh_gives_the_same_activations_and_gradients(axes):
    close(of_small(*axes), of_small(1, 1, 1), 1e-5)


@pytest.mark.parametrize(
    "options",
    [{"remat": r} for r in get_args(decoder.Remat) if r != "none"]
    + [{"scan_layers": False}, {"scan_layers": False, "remat": "offload"}],
    ids=str,
)
def test_remat_and_unrolling_change_nothing(options):
    found = hidden(SMALL, make_mesh(MeshShape(fsdp=4, tensor=2)), tokens_of(SMALL), **options)
    close(found, of_small(1, 4, 2), 1e-5)


STREAM, QUERIES, KEYS = (3, 8, 24, 32), (3, 8, 24, 4, 8), (3, 8, 24, 2, 8)
NORMALISERS = 3, 8 * 2, 4 // 2, 24
"""[layers, batch * kv_heads, queries of a key head, length]"""


@pytest.mark.parametrize(
    ("remat", "memory", "saved"),
    [
        ("full", "", [STREAM]),
        ("context", "", [STREAM, QUERIES, NORMALISERS]),
        ("qkv_context", "", [STREAM, QUERIES, NORMALISERS, QUERIES, KEYS, KEYS]),
        ("offload", "<host>", [STREAM, QUERIES, NORMALISERS, QUERIES, KEYS, KEYS]),
    ],
)
def test_the_backward_pass_finds_saved_what_the_policy_says(remat, memory, saved):
    """Layer inputs, of each layer; queries, keys and values; and what attention leaves for its gradient: the context,
    which has the queries' shape, once, and the normalisers."""
    mesh, tokens = make_mesh(MeshShape(fsdp=1), jax.devices()[:1]), jnp.zeros((8, 24), jnp.int32)

    def loss(params):
        states = decoder.hidden_states(SMALL, params, tokens, tokens, attend, remat=remat)
        return jnp.sum(states)

    with jax.set_mesh(mesh):
        attend = attention.causal("xla")
        program = jax.make_jaxpr(jax.grad(loss))(decoder.abstract_params(SMALL, mesh)).jaxpr
    forward = next(equation for equation in program.eqns if equation.primitive.name == "scan")
    pairs = zip(forward.outvars, forward.params["jaxpr"].jaxpr.outvars, strict=True)  # of all layers, of one
    found = [whole.aval for whole, one in pairs if whole.aval.shape != one.aval.shape]  # not what is carried
    assert sorted(aval.shape for aval in found) == sorted(saved)
    assert all(str(aval).startswith(f"float32{memory}[") for aval in found)


def test_a_later_token_does_not_change_earlier_states():
    mesh, tokens = make_mesh(MeshShape(fsdp=1), jax.devices()[:1]), tokens_of(SMALL)
    changed = tokens.copy()
    changed[:, 12] = (changed[:, 12] + 1) % SMALL.vocab_size
    before, after = (hidden(SMALL, mesh, some, gradients=False)[0] for some in (tokens, changed))
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.abs(before[:, 12:] - after[:, 12:]).max() > 1e-3


@given(
    length=st.integers(1, 40),
    block=st.integers(1, 40),
    heads=st.sampled_from([(2, 2), (4, 2), (4, 4), (4, 1)]),
    cache=st.sampled_from([0, 1 << 14, 1 << 30]),
    cut=st.sampled_from([0, 1 << 13]),
    share=st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]),
)
@example(length=33, block=16, heads=(4, 4), cache=0, cut=5_000, share=0.1)  # two heads at a time
@example(length=33, block=16, heads=(4, 2), cache=20_000, cut=0, share=0.1)  # two rows at a time
@example(length=33, block=16, heads=(4, 2), cache=20_000, cut=0, share=None)
@example(length=17, block=16, heads=(4, 1), cache=1 << 30, cut=0, share=None)  # all at once, a last block of one
@settings(parent=COMPILES, max_examples=4)
def test_blocks_of_queries_few_rows_and_heads_at_a_time_give_the_attention_and_gradients_of_the_whole_matrix(
    length, block, heads, cache, cut, share
):
    """share: of tokens that end a document; None: attention is not kept within documents."""
    random = np.random.default_rng(length * 41 + block)
    draw = lambda heads: jnp.asarray(random.standard_normal((4, length, heads, 8)), jnp.float32)
    query, key, value, upstream = draw(heads[0]), draw(heads[1]), draw(heads[1]), draw(heads[0])

    def with_gradients(attend):
        context, pull = jax.vjp(attend, query, key, value)
        return context, *pull(upstream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        patch.setattr(attention, "SCORES_IN_CACHE", cache)
        patch.setattr(attention, "SCORES_OF_A_CUT", cut)
        documents = None
        if share is not None:
            tokens = jnp.asarray(random.random((4, length)) < share, jnp.int32)
            documents = attention.document_numbers(tokens, 1)
        ours = jax.jit(lambda: with_gradients(lambda *qkv: attention.blockwise(*qkv, documents)))()
    mask = None
    if documents is not None:  # a pair is kept apart by any end from the first to the token before the second
        ends = np.cumsum(tokens, axis=1) - np.asarray(tokens)
        mask = (ends[:, :, None] == ends[:, None, :])[:, None]
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=True, mask=mask)
    for found, expected in zip(ours, jax.jit(lambda: with_gradients(plain))(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "dtype", "kernel"),
    [
        ("cpu", "bfloat16", "xla"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),  # cuDNN has no float32
        ("tpu", "bfloat16", "splash"),
        ("tpu", "float32", "splash"),
    ],
)
def test_the_attention_is_picked_by_device_and_dtype(platform, dtype, kernel):
    assert attention.pick("auto", jnp.dtype(dtype), platform) == kernel
    assert attention.pick(kernel, jnp.dtype(dtype), platform) == kernel
    assert attention.pick("xla", jnp.dtype(dtype), platform) == "xla"


def test_documents_are_masked_without_cudnn():
    bfloat16 = jnp.dtype("bfloat16")
    picked = {platform: attention.pick("auto", bfloat16, platform, True) for platform in ("gpu", "tpu", "cpu")}
    assert picked == {"gpu": "xla", "tpu": "splash", "cpu": "xla"}
    with pytest.raises(UserError, match=r"attention='cudnn' cannot mask documents \(data\.mask_documents_at\); use"):
        attention.pick("cudnn", bfloat16, "gpu", True)


def test_a_forced_kernel_on_the_wrong_device_is_refused_by_name():
    with pytest.raises(UserError, match=r"compute\.attention='splash' needs a tpu"):
        attention.pick("splash", jnp.dtype("bfloat16"), "cpu")


def test_a_model_that_does_not_split_is_refused_by_name():
    with pytest.raises(UserError, match=r"model\.kv_heads=2 is not a multiple of mesh\.tensor=4"):
        decoder.abstract_params(SMALL, make_mesh(MeshShape(fsdp=2, tensor=4)))


def test_a_mesh_that_does_not_use_all_devices_is_refused():
    with pytest.raises(UserError, match=r"mesh\.fsdp=3"):
        make_mesh(MeshShape(fsdp=3))


def test_llama_logits_equal_transformers():
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(
        vocab_size=96, width=32, layers=3, heads=4, kv_heads=2, mlp_width=64, context=32, rope_theta=5e5
    )
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            rope_theta=5e5,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
        )
    ).float()
    weights = {name: tensor.detach().numpy() for name, tensor in peer.named_parameters()}
    stack = lambda pattern: np.stack([weights[f"model.layers.{i}.{pattern}.weight"] for i in range(3)])
    heads = lambda pattern, count: stack(pattern).transpose(0, 2, 1).reshape(3, 32, count, 8)
    params = {
        "embed": weights["model.embed_tokens.weight"],
        "layers": {
            "attention_norm": stack("input_layernorm"),
            "q": heads("self_attn.q_proj", 4),
            "k": heads("self_attn.k_proj", 2),
            "v": heads("self_attn.v_proj", 2),
            "o": stack("self_attn.o_proj").transpose(0, 2, 1).reshape(3, 4, 8, 32),
            "mlp_norm": stack("post_attention_layernorm"),
            "gate": stack("mlp.gate_proj").transpose(0, 2, 1),
            "up": stack("mlp.up_proj").transpose(0, 2, 1),
            "down": stack("mlp.down_proj").transpose(0, 2, 1),
        },
        "norm": weights["model.norm.weight"],
        "head": weights["lm_head.weight"].T,
    }
    mesh = make_mesh(MeshShape(fsdp=1), jax.devices()[:1])
    tokens = tokens_of(config, rows=4, length=32)
    with jax.set_mesh(mesh):
        shapes = decoder.abstract_params(config, mesh)
        params = jax.tree.map(lambda value, leaf: jax.device_put(jnp.asarray(value), leaf.sharding), params, shapes)
        positions = jnp.broadcast_to(jnp.arange(32), tokens.shape)
        states = decoder.hidden_states(config, params, tokens, positions, attention.causal("xla"))
        ours = np.asarray(states) @ np.asarray(decoder.head_weight(config, params))
    with torch.no_grad():
        theirs = peer(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_derivative_of_swiglu_in_bfloat16_is_rounded_once():
    random = np.random.default_rng(0)
    values = jnp.asarray(4 * random.normal(size=(3, 500)), jnp.bfloat16)
    values = values.at[0, :2].set(jnp.array([-300.0, 300.0], jnp.bfloat16))
    found = jax.jit(lambda gate, up, slope: jax.vjp(cpu_kernels.swiglu, gate, up)[1](slope))(*values)
    gate, up, slope = np.asarray(values, np.float64)
    share = scipy.special.expit(gate)
    expected = slope * up * share * (1 + gate * (1 - share)), slope * gate * share
    for ours, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8, atol=1e-6)
