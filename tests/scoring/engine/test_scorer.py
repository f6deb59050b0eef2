"""The scorer gives each request the log-likelihood it would have alone, on any mesh, and keeps what is finished."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from profiles import COMPILES
from program_sizes import largest_array
from scoring_examples import score_once, score_series, write_benchmarks, write_tokenizer

from fineline_jax import prepare_pack
from fineline_jax.checkpoints.formats.huggingface import export_hf
from fineline_jax.checkpoints.open import open_series
from fineline_jax.errors import UserError
from fineline_jax.mesh import BATCH, make_mesh
from fineline_jax.models import attention, decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.sharding import STREAM
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring import score_files
from fineline_jax.scoring.engine import rows, tree_engine
from fineline_jax.scoring.engine import step as engine_step
from fineline_jax.scoring.lm_eval import backend
from fineline_jax.scoring.requests import pack
from fineline_jax.scoring.series import compatibility
from fineline_jax.scoring.series import score_series as series_loop

CONFIG = ModelConfig(vocab_size=512, width=32, layers=2, heads=4, mlp_width=64, context=48)


fresh_params = jax.jit(lambda seed: decoder.init_params(CONFIG, jax.random.key(seed)))


def params_on(mesh: jax.sharding.Mesh, seed: int = 0) -> dict:
    with jax.set_mesh(mesh):
        return fresh_params(seed)


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshShape(), jax.devices()[:1])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bpe", adds_bos=True)


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory) -> pack.Pack:
    folder = tmp_path_factory.mktemp("pack")
    benchmarks = write_benchmarks(folder / "benchmarks", documents=6)
    return prepare_pack("piqa@1,arc_easy,lambada_openai,wikitext", tokenizer, folder / "p", benchmarks=benchmarks)


def plain_loglikelihood(config: ModelConfig, params: dict, stream: np.ndarray, first: int) -> tuple[float, bool]:
    """log p(stream[first:] | stream[:first]) from all logits of one unpadded sequence, window by window."""
    total, greedy = 0.0, True
    mesh = one_device()
    with jax.set_mesh(mesh):
        for start in range(first, len(stream), config.context):
            stop = min(start + config.context, len(stream))
            window = stream[max(0, stop - 1 - config.context) : stop]
            tokens = jnp.asarray(window[None, :-1])
            hidden = decoder.hidden_states(
                config, params, tokens, jnp.arange(tokens.shape[1])[None], attention.causal("xla")
            )
            logits = np.asarray(hidden[0] @ decoder.head_weight(config, params), np.float64)
            logp = (
                logits
                - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
                - logits.max(-1, keepdims=True)
            )
            targets = window[1:][-(stop - start) :]
            total += float(logp[-(stop - start) :][np.arange(len(targets)), targets].sum())
            greedy &= bool((logits[-(stop - start) :].argmax(-1) == targets).all())
    return total, greedy


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_else_is_in_the_batch_the_score_is_the_same(made, data):
    mesh = one_device()
    params = params_on(mesh)
    whole, _ = _whole(made, params, mesh)
    sequences = [row for row in rows.sequences(made.request_tokens, CONFIG.context)]
    sequences = [row for row in sequences if row.scored <= 8 and made.request_context[row.request] >= 0]
    chosen = data.draw(st.lists(st.sampled_from(sequences), min_size=1, max_size=6, unique_by=id))
    batch = rows._batch(chosen, 6, CONFIG.context, 8)
    step = engine_step.score_step(CONFIG, "float32", "xla")
    with jax.set_mesh(mesh):
        logp, _ = step(params, batch.tokens, batch.positions, batch.targets)
    np.testing.assert_allclose(np.asarray(logp)[: len(chosen)].sum(axis=1), whole[batch.requests], atol=1e-5)


_kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}


def _whole(made: pack.Pack, params: dict, mesh: jax.sharding.Mesh) -> tuple[np.ndarray, np.ndarray]:
    if made.hash not in _kept:
        _kept[made.hash] = score_once(made, CONFIG, params, mesh)
    return _kept[made.hash]


def test_the_mesh_does_not_matter(made, monkeypatch):
    expected = _whole(made, params_on(one_device()), one_device())
    mesh = make_mesh(MeshShape(2, 2, 2))
    monkeypatch.setattr(engine_step, "PARENTS", (24, 7))  # several times round each loop, and blocks that overlap
    monkeypatch.setattr(engine_step, "CPU_BLOCK", 48)
    found = score_once(made, CONFIG, params_on(mesh), mesh)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5, rtol=1e-6)
    np.testing.assert_array_equal(found[1], expected[1])


def test_logits_of_all_tokens_or_of_all_parents_never_exist():
    config = ModelConfig(vocab_size=8192, width=16, layers=1, heads=2, mlp_width=16, context=64, tied_embeddings=True)
    mesh = one_device()
    place = jax.NamedSharding(mesh, jax.P(BATCH, None))
    shapes = (2, 256), (1, 128), (1, 1), (1, 200)
    row, parents, used, pairs = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place) for shape in shapes)
    hidden = jax.ShapeDtypeStruct((1, 128, config.width), jnp.float32, sharding=jax.NamedSharding(mesh, STREAM))
    with jax.set_mesh(mesh):
        params = decoder.abstract_params(config, mesh)
        step = engine_step.tree_step(config, "float32", "blockwise")
        largest = largest_array(step, params, row, row, row, parents)
        meet = engine_step.vocabulary_step(config)
        largest = max(largest, largest_array(meet, params, [hidden] * 2, parents, used, pairs, pairs))
    assert config.vocab_size * config.width <= largest < 128 * config.vocab_size / 4


@st.composite
def tokens_of_requests(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray]]:
    """(context, continuation) of some requests that share beginnings."""
    tokens = lambda most, least=1: st.lists(st.integers(0, 5), min_size=least, max_size=most)
    stem = draw(tokens(20))
    contexts = draw(st.lists(tokens(15, 0), min_size=1, max_size=4))
    pairs = draw(st.lists(st.tuples(st.sampled_from(contexts), tokens(6)), min_size=1, max_size=8))
    return [(np.array(stem + rest, np.int32), np.array(asked, np.int32)) for rest, asked in pairs]


@pytest.mark.slow
@settings(parent=COMPILES, max_examples=12)
@given(
    asked=tokens_of_requests(),
    row=st.sampled_from([16, 48, 2048]),
    axes=st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)]),
    order=st.randoms(use_true_random=False),
)
def test_random_requests_on_any_mesh_and_rows_score_as_one_at_a_time(asked, row, axes, order):
    order.shuffle(asked)
    mesh = make_mesh(MeshShape(*axes), jax.devices()[: int(np.prod(axes))])
    packed = backend.request_tokens(asked, [""] * len(asked), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tree_engine.SHAPES, "cpu", dataclasses.replace(tree_engine.SHAPES["cpu"], row=row, multiple=16))
        found, greedy = score_once(packed, CONFIG, params_on(mesh), mesh)
    alone = params_on(one_device())
    for place, (context, continuation) in enumerate(asked):
        expected = plain_loglikelihood(CONFIG, alone, np.concatenate([context, continuation]), len(context))
        assert found[place] == pytest.approx(expected[0], abs=1e-5)
        assert greedy[place] == expected[1]


def test_equal_logits_count_as_greedy_only_for_the_first():
    head = jnp.array([[1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    logp, greedy = log_probabilities(jnp.ones((3, 2)), 3, jnp.arange(3), jnp.array([1, 2, -1]), head)
    assert greedy.tolist() == [True, False, True]
    assert logp[0] == logp[1] and logp[2] == 0.0


def log_probabilities(hidden, used, pairs, targets, head):
    return program_of_log_probabilities(engine_step.PARENTS)(hidden, jnp.asarray(used), pairs, targets, head)


@functools.cache
def program_of_log_probabilities(parents):
    """Compiled once per shape; `parents` is what forward.PARENTS holds meanwhile."""
    local = functools.partial(engine_step.log_probabilities)  # a function of its own, so that nothing older is taken
    return jax.jit(jax.shard_map(local, mesh=one_device(), in_specs=jax.P(), out_specs=jax.P(), check_vma=False))


@given(parents=st.integers(1, 5000))
def test_a_loop_over_blocks_of_parents_can_go_round_twice_or_is_the_last(parents):
    *many, few = engine_step.block_sizes(parents)
    assert all(few < size < parents for size in many) and few <= parents


@pytest.mark.parametrize("vocabulary", [5, 256, 257, 700])
@pytest.mark.parametrize("used", [1, 3, 4, 12, 13, 19])
def test_blocks_of_parents_and_vocabulary_give_the_log_softmax_of_float64(vocabulary, used, monkeypatch):
    monkeypatch.setattr(engine_step, "PARENTS", (8, 3))
    random = np.random.default_rng(vocabulary)
    hidden = random.normal(size=(19, 8)).astype(np.float32)
    head = (3 * random.normal(size=(8, vocabulary))).astype(np.float32)
    pairs, targets = random.integers(0, used, 40), random.integers(-1, vocabulary, 40)
    logp, greedy = log_probabilities(*map(jnp.asarray, (hidden, used, pairs, targets, head)))
    logits = hidden[pairs].astype(np.float64) @ head
    expected = scipy.special.log_softmax(logits, axis=1)[np.arange(40), targets]
    np.testing.assert_allclose(logp, np.where(targets < 0, 0, expected), atol=1e-5, rtol=1e-6)
    np.testing.assert_array_equal(greedy, (targets < 0) | (logits.argmax(axis=1) == targets))


@given(length=st.integers(0, 60), context=st.integers(1, 20))
@settings(deadline=None)
def test_windows_are_lm_evals_rolling_windows(length, context):
    tokens = list(range(1, length + 1))
    theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 0, context, 1))
    ours = rows.windows(np.array([0, *tokens], np.int32), 1, context)
    assert [(window[:-scored].tolist(), window[-scored:].tolist()) for window, scored in ours] == [
        (given, predicted) for given, predicted in theirs
    ]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=60),
    shards=st.sampled_from([1, 4]),
)
@settings(deadline=None)
def test_batches_cover_every_row_once(shapes, shards):
    sequences = [
        rows.ScoredSequence(i, np.arange(given + scored, dtype=np.int32), scored)
        for i, (given, scored) in enumerate(shapes)
    ]
    seen: list[int] = []
    for batch in rows.batches(sequences, 128, shards, 8):
        assert batch.tokens.shape[0] % shards == 0
        for i, request in enumerate(batch.requests):
            row = sequences[request]
            at = batch.positions[i, : row.scored]
            np.testing.assert_array_equal(batch.targets[i, : row.scored], row.tokens[-row.scored :])
            np.testing.assert_array_equal(batch.tokens[i, at], row.tokens[-row.scored - 1 : -1])
            assert (batch.targets[i, row.scored :] == -1).all()
        seen += batch.requests.tolist()
    assert sorted(seen) == list(range(len(shapes)))


def make_series(folder: Path, tokenizer: Path, steps: tuple[int, ...]) -> None:
    mesh = one_device()
    for step in steps:
        export_hf(CONFIG, params_on(mesh, seed=step), folder / f"step{step}", tokenizer)


def test_a_series_is_scored_once_and_again_only_where_weights_changed(made, tokenizer, tmp_path, monkeypatch, capsys):
    make_series(tmp_path / "run", tokenizer, (1, 2))
    calls: list[int] = []
    original = series_loop.make_scorer

    def counted(*arguments, **options):
        score = original(*arguments, **options)
        return lambda params, advance: (calls.append(1), score(params, advance))[1]

    monkeypatch.setattr(series_loop, "make_scorer", counted)

    def score() -> list[Path]:
        return score_series(open_series(str(tmp_path / "run")), made, tmp_path / "out", one_device())

    files = score()
    assert len(files) == 2 and len(calls) == 2
    assert f"{2 * made.requests.num_rows} of" in capsys.readouterr().err.replace(",", "")
    before = [file.read_bytes() for file in files]
    score()
    assert len(calls) == 2
    assert [file.read_bytes() for file in files] == before
    files[1].unlink()
    make_series(tmp_path / "new", tokenizer, (7,))
    (tmp_path / "new/step7/model.safetensors").replace(tmp_path / "run/step1/model.safetensors")
    score()
    assert len(calls) == 4
    assert files[0].read_bytes() != before[0] and files[1].read_bytes() == before[1]
    header = score_files.read_header(files[1])
    assert (header.series, header.checkpoint, header.step, header.context) == ("run", "step2", 2, 48)


def test_a_pack_of_another_tokenizer_or_other_scores_are_refused(made, tmp_path):
    other = write_tokenizer(tmp_path / "other", adds_bos=False)
    make_series(tmp_path / "run", other, (1,))
    opened = open_series(str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"does not add BOS by default.*--bos"):
        score_series(opened, made, tmp_path / "out", one_device())
    state = json.loads((tmp_path / "run/step1/tokenizer.json").read_text())
    state["model"]["merges"].pop()
    (tmp_path / "run/step1/tokenizer.json").write_text(json.dumps(state))
    compatibility._identity.cache_clear()
    with pytest.raises(UserError, match="is not the one the pack was prepared with"):
        score_series(opened, made, tmp_path / "out", one_device())
    changed = pack.Pack({**made.manifest, "max_context": 9}, made.contexts, made.requests, made.documents)
    changed.manifest["hash"] = pack.content_hash(changed)
    assert not (tmp_path / "out").exists(), "what is refused writes nothing"
    score_files.keep_pack(tmp_path / "out", made)
    (tmp_path / "out" / "other").mkdir()
    (tmp_path / "out" / "other" / "step1.parquet").touch()
    with pytest.raises(UserError, match="holds scores of another request pack"):
        score_series(opened, changed, tmp_path / "out", one_device())
    small = ModelConfig(vocab_size=300, width=32, layers=2, heads=4, mlp_width=64, context=48)
    with pytest.raises(UserError, match="the model has 300"):
        score_once(made, small, {}, one_device())
