"""Windows, ALiBi and caps: attention by rows and by prefix trees against the formula in float64; rotary scaling against
transformers; what layers differ in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from request_examples import ragged

from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models import attention, decoder
from fineline_jax.models.attention import Scores
from fineline_jax.models.config import ModelConfig, RopeScaling
from fineline_jax.models.families import of_hf
from fineline_jax.models.families.hf_config import HfConfig, Rope
from fineline_jax.models.rotary import scaled_frequencies
from fineline_jax.models.tree_attention.blockwise import blockwise, reference
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.engine.prefix_tree import subtree_ends
from fineline_jax.scoring.engine.scorer import make_scorer
from fineline_jax.scoring.requests.pack import RequestTokens

PLAIN = ModelConfig(vocab_size=8, width=8, layers=4, heads=2, mlp_width=8)


def formula(query, key, value, seen, distance, window, slopes, softcap) -> np.ndarray:
    """Of one row, in float64: [length, heads, head_dim]; seen, distance [queries, keys]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.empty(query.shape)
    for head in range(query.shape[1]):
        of = head // (query.shape[1] // key.shape[1])
        scores = query[:, head] @ key[:, of].T / np.sqrt(query.shape[2])
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        scores = scores - (0 if slopes is None else slopes[head]) * distance
        scores = np.where(seen & (distance < window), scores, -np.inf)
        out[:, head] = scipy.special.softmax(scores, axis=1) @ value[:, of]
    return out


def drawn(length: int, heads: int, kv_heads: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    of = lambda heads: random.normal(size=(2, length, heads, 4)).astype(np.float32)
    return of(heads), of(kv_heads), of(kv_heads)


CHANGES = [(3, None, 0.0), (None, [0.5, 0.25, 0.1, 0.3], 0.0), (5, [0.5, 0.25, 0.1, 0.3], 0.7), (None, None, 0.7)]


@pytest.mark.parametrize(("window", "slopes", "softcap"), CHANGES)
def test_rows_and_trees_change_scores_as_the_formula_and_rows_have_its_gradient(window, slopes, softcap) -> None:
    length = 150  # more than one block of queries
    query, key, value = drawn(length, 4, 2, 0)
    gap = np.arange(length)[:, None] - np.arange(length)
    scores = (None if window is None else jnp.int32(window), None if slopes is None else jnp.asarray(slopes))
    expected = [
        formula(*row, gap >= 0, gap, window or length, slopes, softcap) for row in zip(query, key, value, strict=True)
    ]
    run = lambda *qkv: attention.changed(*qkv, None, attention.Scores(*scores, softcap))
    np.testing.assert_allclose(run(query, key, value), expected, atol=2e-6)
    documents = jnp.asarray(np.repeat([[0, 1], [0, 1]], [40, 110], axis=1), jnp.int32)
    within = attention.changed(query, key, value, documents, attention.Scores(*scores, softcap))
    np.testing.assert_allclose(within[:, 40:], run(query[:, 40:], key[:, 40:], value[:, 40:]), atol=2e-6)

    def plain(query, key, value):  # one block, nothing made again
        change, by_head = Scores(scores[0], None, softcap), None if slopes is None else scores[1][:, None, None]
        products = jnp.einsum("bqhd,bkhd->bhqk", query, jnp.repeat(key, 2, axis=2)) / 2
        changed = jnp.where(
            gap >= 0, change.of(products, np.arange(length)[:, None], np.arange(length)[None], by_head), -jnp.inf
        )
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(changed), jnp.repeat(value, 2, axis=2))

    slope = jnp.asarray(np.random.default_rng(1).normal(size=query.shape), jnp.float32)
    ours, theirs = (jax.vjp(one, query, key, value)[1](slope) for one in (run, plain))
    for found, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_a_token_of_a_tree_sees_what_it_would_see_in_its_own_request(data: st.DataObject) -> None:
    """Distances are those of depths: every path from the root is a row of its own."""
    length = 32
    depth = [0]
    for _ in range(length - 1):
        depth.append(data.draw(st.integers(0 if depth[-1] > 3 else 1, depth[-1] + 1)))
    depth = np.array(depth, np.int32)
    end = np.arange(length) + subtree_ends(depth) - np.arange(length)
    window, slopes, softcap = data.draw(st.sampled_from(CHANGES))
    query, key, value = (x[:1] for x in drawn(length, 4, 2, int(depth.sum())))
    change = Scores(
        None if window is None else jnp.int32(window), None if slopes is None else jnp.asarray(slopes), softcap
    )
    place = np.arange(length)
    seen = (place[None, :] <= place[:, None]) & (place[:, None] < end[None, :])
    for attend in (reference, lambda *arrays, change: blockwise(*arrays, change=change, query_block=8, key_block=8)):
        found = attend(query, key, value, jnp.asarray(end)[None], jnp.asarray(depth)[None], change=change)
        for leaf in range(length):
            path = np.flatnonzero(seen[leaf])
            gap = np.arange(len(path))[:, None] - np.arange(len(path))
            row = formula(
                query[0, path], key[0, path], value[0, path], gap >= 0, gap, window or length, slopes, softcap
            )
            np.testing.assert_allclose(found[0, leaf], row[-1], atol=3e-6)


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 71])
def test_slopes_are_those_of_bloom(heads: int) -> None:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1].numpy()
    np.testing.assert_allclose(attention.alibi_slopes(heads), theirs, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_scaled_angles_are_those_of_transformers(data: st.DataObject) -> None:
    pytest.importorskip("torch", reason="pip install -e '.[test]'")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = data.draw(st.sampled_from(["linear", "llama3", "yarn", "dynamic"]))
    number = lambda low, high: data.draw(st.floats(low, high))
    given = {"rope_type": kind, "factor": number(1.0, 40.0), "rope_theta": number(50.0, 1e6)}
    if kind in ("llama3", "yarn"):
        given["original_max_position_embeddings"] = data.draw(st.integers(64, 8192))
    if kind == "llama3":
        given |= {"low_freq_factor": number(1.0, 2.0), "high_freq_factor": number(3.0, 8.0)}
    if kind == "yarn":
        given |= {"beta_fast": number(8.0, 64.0), "beta_slow": number(0.5, 2.0), "truncate": data.draw(st.booleans())}
        given |= data.draw(st.sampled_from([{}, {"mscale": 0.7, "mscale_all_dim": 1.2}, {"attention_factor": 1.3}]))
    features = data.draw(st.sampled_from([8, 64, 128]))
    config = LlamaConfig(
        hidden_size=features, num_attention_heads=1, max_position_embeddings=16_384, rope_parameters=given
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config)
    raw = HfConfig("config.json", {"rope_parameters": given})
    read = raw.rotary(16_384, Rope())
    if kind == "dynamic":  # as without scaling up to the context
        ours = read["rope_theta"] ** -(np.arange(0, features, 2) / features)
    else:
        ours = scaled_frequencies(features, read["rope_theta"], read["rope_scaling"])
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5)
    assert read["rope_scaling"].attention_factor == pytest.approx(factor, rel=1e-6)


def test_layers_differ_in_what_the_config_says_and_else_in_nothing() -> None:
    assert decoder.layer_kinds(PLAIN) == (None, None, None)
    mixed = dataclasses.replace(PLAIN, window=3, full_layers=(1,), window_rope_theta=9.0, unrotated_layers=(3,))
    kinds = decoder.layer_kinds(dataclasses.replace(mixed, scale_by_layer=True))
    assert kinds.window.tolist() == [3, 2**31 - 1, 3, 3] and kinds.table.tolist() == [1, 0, 1, 2]
    np.testing.assert_allclose(kinds.scale, [1, 1 / 2, 1 / 3, 1 / 4])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"full_layers": (1,)}, "set model.window"),
        ({"window": 2, "full_layers": (4,)}, "must name layers from 0 to 3"),
        ({"window": -1}, "model.window=-1 must not be negative"),
        ({"shared_norm": True}, "set model.parallel_residual as well"),
        ({"post_norms": True, "norm_after": True}, "choose one"),
        ({"rope_scaling": RopeScaling("yarn", 2.0)}, "original_context=0 must be at least 1"),
        ({"rope_scaling": RopeScaling("linear", 0.0)}, "factor=0.0 must be above 0"),
        (
            {"mixer": "mamba", "heads": 0, "state_size": 2, "conv_width": 2, "step_rank": 2, "window": 3},
            "model.window=3",
        ),
    ],
)
def test_flags_that_mean_nothing_are_refused(changes, said) -> None:
    with pytest.raises(UserError, match=said):
        dataclasses.replace(PLAIN, kv_heads=0, head_dim=0, **changes)


def test_kernels_without_windows_are_refused_by_name_and_not_picked() -> None:
    for kernel, platform in (("cudnn", "gpu"), ("splash", "tpu")):
        assert attention.pick("auto", jnp.dtype("bfloat16"), platform, plain_scores=False) == "xla"
        with pytest.raises(UserError, match=f"compute.attention='{kernel}' has no windows"):
            attention.pick(kernel, jnp.dtype("bfloat16"), platform, plain_scores=False)
    assert not dataclasses.replace(PLAIN, window=3).plain_scores
    assert not dataclasses.replace(PLAIN, positions="alibi").plain_scores
    assert not dataclasses.replace(PLAIN, attention_softcap=2.0).plain_scores


def test_no_request_reaches_beyond_positions_that_end() -> None:
    requests = RequestTokens(ragged([[1, 2], [0]]), ragged([[3]]), np.zeros(1, int), np.zeros(1, int))
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    for change in ({"positions": "learned"}, {"rope_scaling": RopeScaling("dynamic", 2.0)}):
        with pytest.raises(UserError, match="the positions of this model end at 2048"):
            make_scorer(requests, dataclasses.replace(PLAIN, **change), mesh, context=2049)
    make_scorer(requests, PLAIN, mesh, context=2049)


def test_a_cap_that_is_null_is_none() -> None:
    raw = {"hidden_size": 8, "vocab_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 8}
    raw |= {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": None}
    config = of_hf(HfConfig("config.json", raw))[1]
    assert (config.attention_softcap, config.logit_softcap) == (0.0, 30.0)  # the other is the class's
