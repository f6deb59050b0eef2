"""What the engines do with a plan, in numpy: packing, steps, rounds, sums, and what is kept for the next checkpoint.

Every expectation is made by trying all possibilities, or by saying the definition again in a few lines.
"""

import collections
import dataclasses
import functools
import heapq
import itertools
import math
import types

import jax
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from request_examples import Requests, few_and_many_parents, few_shot, requests
from series_examples import one_device

from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.tree_attention import blockwise, gpu, tpu
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.engine import plan_table, prefix_tree, row_engine, rows, scorer, tree_engine, tree_packing
from fineline_jax.scoring.engine.trie import Tree, build_tree
from fineline_jax.scoring.requests.pack import Pack

quick = settings(deadline=None, max_examples=60)


def tree_of(asked: Requests, context: int) -> Tree:
    return build_tree(asked.tokens, context)


# Packing


@pytest.mark.parametrize("seed", range(6))
def test_a_row_stops_where_the_next_one_reaches_farthest_counting_what_that_one_must_repeat(seed):
    """Every run and every room of some small trees."""
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(0, 2, rng.integers(1, 7)).tolist() for _ in range(14)]
    tree = tree_of(Requests(contexts, [[1, 1]] * 14, list(range(14)), [0] * 14), 12)
    sizes, segments = np.diff(tree.starts), len(tree.branch)
    above = tree.depth[tree.starts[:-1]]
    # A row holds the ancestors of its first node, then its own nodes.
    places = lambda a, b: int(above[a] + sum(sizes[a:b]))
    for first, last in itertools.combinations(range(segments + 1), 2):
        assert tree_packing._positions(tree, (first, last)) == places(first, last)
        for free in range(places(first, last) + 2):
            if places(first, last) <= free:
                expected = last
            else:
                fits = [stop for stop in range(first + 1, last) if places(first, stop) <= free]
                # How far a row of any length gets that starts at `stop`, against one that starts here again.
                reach = {stop: int(tree.starts[stop] - above[stop]) for stop in [first, *fits]}
                best = max(fits, key=lambda stop: (reach[stop], stop), default=first)
                expected = best if reach[best] > reach[first] else first
            assert tree_packing._cut(tree, first, last, free) == expected


@quick
@given(
    asked=requests(), context=st.integers(2, 12), row_length=st.integers(1, 60), multiple=st.integers(1, 4),
    group=st.integers(1, 3),
)  # fmt: skip
def test_the_length_of_rows_is_of_all_multiples_the_one_that_feeds_least(asked, context, row_length, multiple, group):
    tree = tree_of(asked, context)
    needed = -(-max(1, tree.longest) // multiple) * multiple
    most = max(needed, row_length // multiple * multiple)
    half = most // multiple // 2 * multiple
    one_group = len(tree.tokens) // (group * multiple) * multiple
    lengths = range(max(needed, min(half, one_group)), most + 1, multiple)
    fed = {length: -(-len(tree_packing._fill(tree, length)) // group) * group * length for length in lengths}
    runs, length = tree_packing.fit(tree, row_length, multiple, group)
    assert length == max(length for length in fed if fed[length] == min(fed.values())), "of equals the longest"
    whole = sorted(segment for row in runs for a, b in row for segment in range(a, b))
    assert whole == list(range(len(tree.branch))), "every segment once"
    for row in runs:
        assert row == sorted(row) and all(stop < start for (_, stop), (start, _) in itertools.pairwise(row))
        assert sum(tree_packing._positions(tree, run) for run in row) <= length


def test_rows_are_shorter_than_half_only_if_one_group_of_them_holds_all():
    """Seven of 13 tokens: in rows of 13 there would be no unused place, but each attends alone."""
    asked = Requests([[i] * 13 for i in range(7)], [[9]] * 7, list(range(7)), [0] * 7)
    assert asked.plan(64, row_length=40, multiple=1).tokens.shape == (4, 26)
    assert asked.plan(64, row_length=40, multiple=1, group=7).tokens.shape == (7, 13)


def test_large_subtrees_go_each_where_it_leaves_least_room():
    """Sizes in 64ths of a row: 24 are left beside 40 and 30 beside 34."""
    sizes = [40, 34, 22, 20]
    contexts = [[1000 * i + t for t in range(16 * size)] for i, size in enumerate(sizes)]
    count = len(sizes)
    asked = Requests(contexts, [[1]] * count, list(range(count)), [0] * count)
    tree = tree_of(asked, 2048)
    filled = tree_packing._fill(tree, 1024)
    of_rows = sorted(sorted(sizes[contexts_of(tree, contexts, run)] for run in row) for row in filled)
    assert of_rows == [[20, 34], [22, 40]]


def contexts_of(tree: Tree, contexts: list[list[int]], run: tuple[int, int]) -> int:
    """Which context a run of one segment is."""
    assert run[1] == run[0] + 1
    return int(tree.tokens[tree.starts[run[0]]]) // 1000


def test_small_subtrees_fill_the_emptiest_row_first():
    sizes = [40, 56, 3, 3]
    contexts = [[1000 * i + t for t in range(16 * size)] for i, size in enumerate(sizes)]
    tree = tree_of(Requests(contexts, [[1]] * 4, list(range(4)), [0] * 4), 2048)
    rows_ = tree_packing._fill(tree, 1024)
    named = sorted(sorted(s for a, b in row for s in range(a, b)) for row in rows_)
    assert named == [[0, 1, 2], [3]], "in the order of the tree the one of 56 is last"


def test_a_row_whose_runs_fit_into_the_others_is_dissolved():
    tree = tree_of(
        Requests([[i] * n for i, n in enumerate((700, 300, 300, 700))], [[9]] * 4, [0, 1, 2, 3], [0] * 4), 2048
    )
    apart = [[(0, 1)], [(1, 3)], [(3, 4)]]
    assert tree_packing._dissolve(tree, apart, 1000) == [[(0, 2)], [(2, 4)]]
    assert tree_packing._dissolve(tree, apart, 999) == apart, "one place too few"
    contexts = [[i] * n for i, n in enumerate((500, 300, 300))]
    tree = tree_of(Requests(contexts, [[9]] * 3, [0, 1, 2], [0] * 3), 2048)
    apart = [[(0, 1)], [(1, 2)], [(2, 3)]]
    assert tree_packing._dissolve(tree, apart, 1000) == [[(0, 1)], [(1, 3)]], "what was filled up has less room"


def test_neighbouring_runs_become_one():
    assert tree_packing._joined([(0, 2), (2, 3), (4, 5), (5, 6), (7, 8)]) == [(0, 3), (4, 6), (7, 8)]


# The order of the rows


@pytest.mark.parametrize("shards, rows_of_shard", [(4, 1), (2, 2), (1, 3)])
def test_like_pieces_are_in_one_step_and_the_fullest_is_first_in_every_other(shards, rows_of_shard):
    """Devices wait for each other in every step, and over all steps none has more than another."""
    group = shards * rows_of_shard
    plan = few_and_many_parents(60).plan(64, row_length=20, multiple=4, group=group, shards=shards)
    places = [plan.target_parent[a:b] for a, b in itertools.pairwise(plan.target_offsets)]
    parents = np.array([len(set(row.tolist())) for row in places])
    pieces = parents.reshape(-1, shards, rows_of_shard).sum(axis=2)
    assert len(pieces) > 4 and len(set(pieces.ravel().tolist())) > 1
    for number, step in enumerate(pieces.tolist()):
        assert step == sorted(step, reverse=number % 2 == 0)
    assert all(before.min() >= after.max() for before, after in itertools.pairwise(pieces))
    # The fullest rows first, each to the piece that has least so far of those with room.
    expected, open_ = [[] for _ in range(pieces.size)], [(0, i) for i in range(pieces.size)]
    for count in sorted(parents.tolist(), reverse=True):
        total, i = heapq.heappop(open_)
        expected[i].append(count)
        if len(expected[i]) < rows_of_shard:
            heapq.heappush(open_, (total + count, i))
    assert sorted(pieces.ravel().tolist()) == sorted(map(sum, expected))


# Steps and vocabulary batches


def simulate(plan: prefix_tree.Plan, group: int, shards: int, per_batch: int) -> tuple[np.ndarray, tree_engine.Steps]:
    """Each target's parent when the arrays are read as `forward.tree_step` and `vocabulary_step` say; -1: never met."""
    steps = tree_engine.Steps(plan, group, shards, per_batch)
    length, each = plan.tokens.shape[1], group // shards
    homes = np.full(len(plan.target_token), -1)
    for number in range(steps.vocabulary_batches):
        hidden = []
        for step in steps.of_batch(number):
            *rows_, parents = steps.rows(step)
            own = slice(step * group, (step + 1) * group)
            for given_, whole in zip(rows_, (plan.tokens, plan.depth, plan.end), strict=True):
                np.testing.assert_array_equal(given_, whole[own])
            assert parents.shape == (shards, steps.most_parents) and parents.dtype == np.int32
            hidden.append(parents + (step * group + np.arange(shards)[:, None] * each) * length)
        hidden += hidden[-1:] * (per_batch - len(hidden))
        laid = np.concatenate(hidden, axis=1)
        positions, used, parents, targets = steps.targets(number)
        assert {array.dtype for array in (positions, used, parents, targets)} == {np.dtype(np.int32)}
        assert positions.shape == (shards, steps.most_positions) and parents.shape == targets.shape == (
            shards,
            steps.most_targets,
        )
        for shard, chosen in enumerate(steps.targets_of_batch(number)):
            met = laid[shard][positions[shard, : used[shard, 0]]]
            assert len(set(met.tolist())) == len(met) and (np.diff(met) > 0).all(), "the vocabulary once per parent"
            assert (homes[chosen] == -1).all()
            assert parents[shard, : len(chosen)].max(initial=0) < max(1, used[shard, 0])
            homes[chosen] = met[parents[shard, : len(chosen)]] if len(chosen) else []
            assert set(met.tolist()) == set(homes[chosen].tolist())
            np.testing.assert_array_equal(targets[shard, : len(chosen)], plan.target_token[chosen])
            assert (targets[shard, len(chosen) :] == -1).all()
    return homes, steps


@quick
@given(
    asked=requests(), context=st.integers(2, 16), row_length=st.integers(1, 40), shards=st.integers(1, 3),
    each=st.integers(1, 2), per_batch=st.integers(1, 3),
)  # fmt: skip
@example(few_shot(6, 40), 16, 24, 2, 2, 2)
@example(few_shot(6, 9), 16, 24, 3, 1, 2)
def test_steps_and_batches_meet_every_parent_once_and_score_every_target(
    asked, context, row_length, shards, each, per_batch
):
    group = shards * each
    plan = asked.plan(context, row_length=row_length, multiple=4, group=group, shards=shards)
    homes, steps = simulate(plan, group, shards, per_batch)
    row_of = np.repeat(np.arange(len(plan.tokens)), np.diff(plan.target_offsets))
    np.testing.assert_array_equal(homes, row_of * plan.tokens.shape[1] + plan.target_parent)
    # No array is larger than the fullest piece or round needs.
    pieces = [set() for _ in range(len(plan.tokens) // each)]
    for pair, row in enumerate(row_of):
        pieces[row // each].add(homes[pair])
    assert steps.most_parents == max([1, *map(len, pieces)])
    of_rounds: dict[tuple[int, int], int] = {}
    for piece, parents in enumerate(pieces):
        where = piece // shards // per_batch, piece % shards
        of_rounds[where] = of_rounds.get(where, 0) + len(parents)
    assert steps.most_positions == max([1, *of_rounds.values()])
    widest = [len(chosen) for number in range(steps.vocabulary_batches) for chosen in steps.targets_of_batch(number)]
    assert steps.most_targets == max([1, *widest])
    # A request is done with its last scored token.
    last = np.zeros(len(asked.context_of), int)
    for request in range(len(last)):
        pairs = plan.token_target[plan.token_offsets[request] : plan.token_offsets[request + 1]]
        last[request] = max((row_of[pair] // group // per_batch for pair in pairs), default=0)
    done = [steps.requests_of_batch(number) for number in range(steps.vocabulary_batches)]
    assert done == np.bincount(last, minlength=steps.vocabulary_batches)[: steps.vocabulary_batches].tolist()
    assert not done or sum(done) == len(last)


def test_a_request_is_done_in_the_last_of_its_rows_wherever_its_last_token_is():
    """The first request has its last token in row 0, and the one before it in row 2."""
    plan = types.SimpleNamespace(
        tokens=np.zeros((3, 8)), token_offsets=np.array([0, 2, 3]), token_target=np.array([2, 0, 1])
    )
    assert tree_engine._requests_done(plan, np.array([0, 1, 2])).tolist() == [0, 1, 1]


# Sums


def test_log_likelihoods_are_summed_in_float64():
    """40,000 tokens: in float32 the sum would be wrong in its fourth digit behind the point."""
    rng = np.random.default_rng(0)
    logp = -rng.random(40_000, np.float32) * 3
    asked = Requests([[1]], [[2] * 30_000, [], [3] * 20_000], [0, 0, 0], [0, 0, 0])
    pairs = np.append(rng.integers(0, 39_999, 49_999), 39_999)
    plan = dataclasses.replace(asked.plan(64, multiple=64), token_target=pairs, target_token=np.zeros(40_000, np.int32))
    total, greedy = prefix_tree.of_requests(plan, logp, np.arange(40_000) != 39_999)
    parts = np.split(logp[plan.token_target], [30_000, 30_000])
    expected = [math.fsum(part.tolist()) for part in parts]
    assert abs(float(parts[0].sum(dtype=np.float32)) - expected[0]) > 1e-4
    np.testing.assert_allclose(total, expected, rtol=0, atol=1e-8)
    assert total.dtype == np.float64 and total[1] == 0.0
    assert greedy.tolist() == [True, True, False], "one miss is enough"


def bare_pack(contexts: list[list[int]], continuations: list[list[int]], places: list[int], tasks: list[str]) -> Pack:
    lists = lambda found: pa.array(found, pa.large_list(pa.int32()))
    manifest = {"hash": repr((contexts, continuations, places, tasks)), "prefix_token": 7}
    requests_ = {
        "task": pa.array(tasks).dictionary_encode(),
        "context": pa.array(places, pa.int32()),
        "tokens": lists(continuations),
    }
    return Pack(manifest, pa.table({"tokens": lists(contexts)}), pa.table(requests_), pa.table({}))


def test_the_plain_engine_adds_the_windows_of_a_text_in_float64(monkeypatch):
    """The step is replaced by a table of log-probabilities, and says what is greedy by the target."""
    rng = np.random.default_rng(1)
    table = -rng.random(50, np.float32) * 9
    texts = [rng.integers(1, 50, size).tolist() for size in (20_000, 40, 1, 0)]
    texts += [[2] * 40, [3] + [2] * 80, [2] * 80 + [3]]
    asked = [*texts, [2, 5], [5, 2], [2, 2]]
    made = bare_pack([[3, 4]], asked, [-1] * len(texts) + [0] * 3, ["a"] * len(asked))

    def step(params, tokens, positions, targets):
        targets = np.asarray(targets)
        return np.where(targets < 0, 0, table[targets]).astype(np.float32), (targets < 0) | (targets == 2)

    monkeypatch.setattr(
        row_engine, "score_step", lambda *_: lambda *arrays: tuple(map(jax.numpy.asarray, step(*arrays)))
    )
    config = types.SimpleNamespace(plain_scores=True)
    told: list[int] = []
    score = row_engine.make_row_scorer(
        made.request_tokens, config, 64, one_device(), "float32", batch_tokens=256  # type: ignore[arg-type]
    )  # fmt: skip
    found, greedy = score({}, told.append)
    again, _ = score({})
    assert again.tobytes() == found.tobytes(), "nothing of one checkpoint is left for the next"
    expected = [math.fsum(table[np.array(text, int)].tolist()) for text in asked]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)
    assert greedy.tolist() == [set(text) <= {2} for text in asked]
    assert sum(told) == len(asked) and told[0] == 1, "the empty text is done at once, the long one with its last window"


@quick
@given(asked=requests(), context=st.integers(2, 16))
def test_statistics_count_what_a_plan_feeds(asked, context):
    plan = asked.plan(context, row_length=24, multiple=4, group=2)
    found = prefix_tree.statistics(plan)
    parents = {
        (row, parent)
        for row in range(len(plan.tokens))
        for parent in plan.target_parent[plan.target_offsets[row] : plan.target_offsets[row + 1]].tolist()
    }
    fed = len(plan.tokens) * plan.tokens.shape[1]
    assert (found.rows, found.length) == plan.tokens.shape and found.fed_tokens == fed
    assert found.overhead == fed / max(1, plan.unique_tokens) and found.saving == plan.naive_tokens / max(1, fed)
    assert (found.unique_tokens, found.naive_tokens) == (plan.unique_tokens, plan.naive_tokens)
    assert (found.targets, found.parents) == (len(plan.target_token), len(parents))
    assert found.scored_tokens == sum(map(len, asked.continuations))


# What is kept


@functools.cache
def some_pack() -> Pack:
    contexts = [list(range(20)), list(range(5, 30))]
    return bare_pack(
        contexts, [[i % 7, i % 5] for i in range(40)] + [[1] * 30], [0, 1] * 20 + [-1], ["a"] * 20 + ["b"] * 21
    )


@functools.cache
def long_pack() -> Pack:
    """More tokens than one batch holds, by default."""
    return bare_pack([list(range(20))], [[1, 2]] * 7000, [0] * 7000, ["a"] * 7000)


SMALL = ModelConfig(vocab_size=32, width=16, layers=1, heads=2, mlp_width=16, context=24)
SHAPE = tree_engine.Shape(row=64, rows=1, multiple=8, per_batch=2)


def same(one: tree_engine.Steps, other: tree_engine.Steps) -> bool:
    if (one.group, one.shards, one.per_batch) != (other.group, other.shards, other.per_batch):
        return False
    return all(
        np.array_equal(getattr(one.plan, field.name), getattr(other.plan, field.name))
        for field in dataclasses.fields(one.plan)
    )


def test_the_options_of_the_steps_reach_their_plan():
    shape = dataclasses.replace(SHAPE, multiple=48, per_batch=3)
    made = tree_engine.plan_steps(some_pack().request_tokens, 24, 2 * 2 * 64, 2, shape)
    plan = prefix_tree.plan(some_pack().request_tokens, 24, row_length=64, multiple=48, group=4, shards=2)
    assert same(made, tree_engine.Steps(plan, 4, 2, 3))
    for others in ((9, 256, 2, shape), (24, 128, 2, shape), (24, 256, 1, shape), (24, 256, 2, SHAPE)):
        assert not same(made, tree_engine.plan_steps(some_pack().request_tokens, *others))


def test_a_scorer_plans_and_compiles_once_for_all_its_parameters(monkeypatch):
    counts = collections.Counter()

    def counted(module, name):
        original = getattr(module, name)

        def call(*arguments, **options):
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counted(tree_engine, "plan_steps")
    counted(row_engine, "plan_rows")
    counted(decoder, "hidden_states")  # as often as a step is traced
    with jax.set_mesh(one_device()):
        params = [decoder.init_params(SMALL, jax.random.key(seed)) for seed in (1, 2, 1)]
    for engine, plan in (("tree", "plan_steps"), ("rows", "plan_rows")):
        counts.clear()
        score = scorer.make_scorer(some_pack().request_tokens, SMALL, one_device(), engine=engine)
        first, second, again = (score(one)[0] for one in params)
        assert counts[plan] == 1
        traced = counts["hidden_states"]
        score(params[1])
        assert counts["hidden_states"] == traced > 0
        assert (first != second).any() and first.tobytes() == again.tobytes()


def test_rows_are_batches_of_the_tokens_asked_in_whole_tiles():
    eight = make_mesh(MeshShape(replica=8, fsdp=1))
    chips = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="gpu")] * 2), shape=eight.shape)
    arguments = [(some_pack(), 24, 256, one_device()), (some_pack(), 9, 256, one_device())]
    arguments += [(some_pack(), 24, 64, one_device()), (some_pack(), 24, 256, eight)]
    arguments += [(bare_pack([[1]], [[2]], [0], ["a"]), 24, 256, one_device()), (some_pack(), 24, None, one_device())]
    arguments += [(some_pack(), 24, 256, chips), (long_pack(), 24, None, chips), (long_pack(), 24, None, one_device())]
    shapes = lambda found: [(b.requests.tolist(), b.tokens.tolist(), b.targets.tolist()) for b in found]
    for pack, context, tokens, mesh in arguments:
        given_ = tokens or (2 * 32768 if mesh is chips else 4096)
        devices, least = 1 if mesh.devices.size == 1 else 8, 128 if mesh is chips else 32  # kernels want whole tiles
        asked = rows.batches(list(rows.sequences(pack.request_tokens, context)), given_, devices, least)
        assert shapes(row_engine.plan_rows(pack.request_tokens, context, tokens, mesh)) == shapes(asked)


@pytest.mark.parametrize(
    ("batch_tokens", "row_length", "group"),
    [(None, 64, 8), (8 * 64, 64, 8), (8 * 64 * 3, 64, 24), (8 * 64 * 3 - 1, 64, 16), (8 * 40 + 7, 40, 8), (3, 0, 8)],
)
def test_a_step_has_so_many_tokens_over_all_devices(monkeypatch, batch_tokens, row_length, group):
    monkeypatch.setitem(tree_engine.SHAPES, "cpu", SHAPE)
    asked: list[tuple] = []

    class Enough(Exception):
        pass

    def plan(*arguments, **options):
        asked.append((*arguments, options))
        raise Enough

    monkeypatch.setattr(tree_engine, "plan", plan)
    tokens = some_pack().request_tokens
    with pytest.raises(Enough):
        tree_engine.make_tree_scorer(
            tokens, None, 24, make_mesh(MeshShape(4, 2, 1)), "float32", batch_tokens=batch_tokens  # type: ignore[arg-type]
        )  # fmt: skip
    assert asked == [(tokens, 24, {"row_length": row_length, "multiple": 8, "group": group, "shards": 8})]


def test_a_device_has_one_row_on_a_cpu_and_four_elsewhere_in_whole_blocks_of_its_attention():
    shapes = tree_engine.SHAPES
    assert {name: (shape.row, shape.rows) for name, shape in shapes.items()} == {
        "cpu": (8192, 1), "gpu": (8192, 4), "tpu": (8192, 4)
    }  # fmt: skip
    blocks = {
        "cpu": (blockwise.QUERY_BLOCK, blockwise.KEY_BLOCK), "tpu": (tpu.BLOCK,),
        "gpu": {block for pair in gpu.BLOCKS.values() for block in pair},
    }  # fmt: skip
    for name, shape in shapes.items():
        assert all(shape.multiple % block == 0 for block in blocks[name]) and shape.row % shape.multiple == 0


# Rows of the plain engine

sequences = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=40)


@quick
@given(
    shapes=sequences,
    shards=st.sampled_from([1, 4]),
    batch_tokens=st.integers(1, 300),
    compile_=st.sampled_from([0, 16]),
)
def test_batches_are_as_large_as_asked_and_no_wider_than_their_rows_need(shapes, shards, batch_tokens, compile_):
    found = [
        rows.ScoredSequence(i, np.arange(given_ + scored, dtype=np.int32), scored)
        for i, (given_, scored) in enumerate(shapes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "COMPILE", compile_)
        made = rows.batches(found, batch_tokens, shards, 8)
    for batch in made:
        count, length = batch.tokens.shape
        assert count % shards == 0 and length % 8 == 0
        assert count == shards or count * length <= batch_tokens
        own = [found[request] for request in batch.requests]
        assert length >= max(len(row.tokens) - 1 for row in own)
        width = batch.targets.shape[1]
        assert width in (1, 4, 16, 64, length) and max(row.scored for row in own) <= width <= length
        assert (batch.targets[len(own) :] == -1).all()
        if compile_ == 0:  # a program more costs nothing: each shape is the smallest for its rows
            assert {-(-max(1, len(row.tokens) - 1) // 8) * 8 for row in own} == {length}
            assert {min(4 ** (math.ceil(math.log(row.scored, 4) - 1e-9)), length) for row in own} == {width}
    if compile_ and sum(len(row.tokens) for row in found) < compile_ * batch_tokens:
        most = 4 ** math.ceil(math.log(max(row.scored for row in found), 4) - 1e-9)
        assert all(batch.targets.shape[1] == min(most, batch.tokens.shape[1]) for batch in made)


def test_a_class_of_rows_is_kept_apart_from_sixteen_batches_on():
    """Compiling a program costs about as much."""
    one = lambda i, scored: rows.ScoredSequence(i, np.arange(10, dtype=np.int32), scored)
    widths = lambda count: {
        batch.targets.shape[1] for batch in rows.batches([*(one(i, 1) for i in range(count)), one(count, 3)], 20, 1, 10)
    }
    assert widths(31) == {4} and widths(32) == {1, 4}, "16 batches of 20 tokens are 32 rows of 10"


@quick
@given(
    lengths=st.lists(st.integers(1, 12).map(lambda n: 8 * n), min_size=1, max_size=40), price=st.integers(0, 300)
)  # fmt: skip
def test_few_lengths_cost_least_of_all_choices(lengths, price):
    distinct = sorted(set(lengths))

    def cost(chosen: tuple[int, ...]) -> int:
        return price * len(chosen) + sum(min(c for c in chosen if c >= length) for length in lengths)

    choices = [
        (*some, distinct[-1])
        for size in range(len(distinct))
        for some in itertools.combinations(distinct[:-1], size)
    ]  # fmt: skip
    found = rows._few_lengths(np.array(lengths), price)
    assert found == sorted(set(found)) and cost(tuple(found)) == min(map(cost, choices))


def test_requests_that_lose_tokens_are_counted_from_one_beyond_the_context():
    """The last token is only a target. Texts that are scored as a whole lose nothing: they are cut into windows."""
    lengths = [23, 24, 25, 26, 27]
    made = bare_pack([[1] * n for n in lengths], [[2]] * 5 + [[2] * 90], [0, 1, 2, 3, 4, -1], ["a"] * 6)
    assert [rows.truncated(made.request_tokens, context) for context in (22, 23, 24, 25, 26, 27)] == [5, 4, 3, 2, 1, 0]


# The table


def test_a_line_of_the_table_is_a_group_or_a_task_of_none(monkeypatch):
    made = some_pack()
    made.manifest.update(groups=[{"group": "both", "tasks": ["a", "b"]}], tasks=[{"task": "a"}, {"task": "b"}])
    alone = lambda groups: Pack(made.manifest | {"groups": groups}, made.contexts, made.requests, made.documents)
    [line] = plan_table.plan_table(made, 24, 512)
    whole = prefix_tree.statistics(prefix_tree.plan(made.request_tokens, 24, row_length=512))
    assert line == (
        "both",
        "41",
        "1",
        "256",
        f"{whole.unique_tokens:,}",
        f"{whole.overhead:.3f}",
        f"{whole.saving:.2f}",
    )
    assert (whole.rows, whole.length) == (1, 256)
    names = [line[0] for line in plan_table.plan_table(alone([{"group": "first", "tasks": ["a"]}]), 24, 512)]
    assert names == ["first", "b"]
    found = [dict(zip(plan_table.HEADER, line, strict=True)) for line in plan_table.plan_table(alone([]), 24, 512)]
    assert [(line["task"], line["requests"]) for line in found] == [("a", "20"), ("b", "21")]
    for line, chosen in zip(found, (range(20), range(20, 41)), strict=True):  # each as if it were the only one
        contexts = [made.context_tokens[row].tolist() for row in range(2)]
        lists = [made.continuation_tokens[i].tolist() for i in chosen]
        one = bare_pack(contexts, lists, made.request_context[list(chosen)].tolist(), ["x"] * len(chosen))
        stats = prefix_tree.statistics(prefix_tree.plan(one.request_tokens, 24, row_length=512))
        assert line["unique tokens"] == f"{stats.unique_tokens:,}" and line["rows"] == f"{stats.rows}"
        assert line["fed / unique"] == f"{stats.overhead:.3f}" and line["one by one / fed"] == f"{stats.saving:.2f}"
    long = bare_pack([[i, *range(999)] for i in range(4)], [[1]] * 4, [0, 1, 2, 3], ["a"] * 4)
    long.manifest.update(groups=[], tasks=[{"task": "a"}])
    [line] = plan_table.plan_table(long, 2048, 2048)
    assert line[1:5] == ("4", "2", "2,048", "4,000")
    assert plan_table.plan_table(long, 500, 2048)[0][4] == "500", "what is left of them is equal"
