"""Recipes: the constants as published, errors that name the field, and a JSON file that can be given back."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fineline_jax.catalogue import config_names, find_config, load_recipe
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import (
    Batch,
    Checkpoints,
    Clock,
    Compute,
    Data,
    Every,
    Logging,
    Loss,
    MeshShape,
    Optimizer,
    Recipe,
    Schedule,
    Source,
    Validation,
    differences,
    from_json,
    to_json,
)
from fineline_jax.training.schedule import learning_rate

GOLDEN = Path(__file__).parent / "golden"
RECIPES = config_names("{}.py")


def small(**changes) -> Recipe:
    values = {
        "name": "small",
        "model": ModelConfig(vocab_size=64, width=16, layers=1, heads=2, mlp_width=32, context=16),
        "data": Data((Source("x"),), sequence_length=16),
        "batch": Batch(4),
        "optimizer": Optimizer(Schedule()),
        "tokens": 6400,
    }
    return Recipe(**(values | changes))


@pytest.mark.parametrize("name", RECIPES)
def test_every_resolved_recipe_is_the_golden_text(name):
    """A change here is a change of what people reproduce. Write the files anew with: python tests/test_recipe.py"""
    assert to_json(load_recipe(name)) == (GOLDEN / f"{name}.json").read_text()


def test_the_recipes_of_the_issue_are_there():
    assert set(RECIPES) >= {
        "demo", "llama_60m", "llama_350m", "llama_1b", "amber_7b",
        "open_llama_3b", "open_llama_7b", "open_llama_13b", "open_llama_7b_v2",
    }  # fmt: skip


def test_amber_has_360_chunks_of_762_steps():
    amber = load_recipe("amber_7b")
    assert amber.model.parameters == 6_738_415_616
    assert amber.tokens_per_step == 4_587_520
    assert amber.steps == 274_320
    assert amber.kept_steps() == tuple(range(0, 274_321, 762))


def test_the_demo_keeps_at_least_twelve_checkpoints():
    assert len(load_recipe("demo").kept_steps()) >= 12


def test_open_llama_has_100_milestones_of_2500_steps():
    open_llama = load_recipe("open_llama_7b")
    assert open_llama.tokens_per_step == 4_194_304
    assert open_llama.kept_steps() == tuple(range(0, 250_001, 2_500))


@pytest.mark.parametrize("name", RECIPES)
def test_a_written_recipe_can_be_given_back(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "recipe.json").write_text(to_json(recipe))
    assert load_recipe(str(tmp_path)) == load_recipe(str(tmp_path / "recipe.json")) == recipe


@given(
    sequences=st.integers(1, 9),
    steps=st.integers(1, 400),
    dense=st.integers(1, 900),
    sparse=st.integers(1, 5000),
    until=st.integers(1, 5000),
    at=st.lists(st.integers(0, 20_000), max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_a_milestone_is_the_first_step_with_at_least_its_tokens(sequences, steps, dense, sparse, until, at):
    tokens = sequences * 16 * steps
    recipe = small(
        batch=Batch(sequences),
        tokens=tokens,
        checkpoints=Checkpoints(initial=False, at_tokens=tuple(at), every=(Every(dense, until), Every(sparse))),
    )
    end = min(until, tokens)
    milestones = list(range(dense, end + 1, dense)) + [t for t in range(sparse, tokens + 1, sparse) if t > end]
    milestones += [t for t in at if t <= tokens]
    expected = {next(s for s in range(steps + 1) if s * sequences * 16 >= t) for t in milestones} | {steps}
    assert recipe.kept_steps() == tuple(sorted(expected))


M = dict(vocab_size=64, width=16, layers=1, heads=2, mlp_width=32, context=16)


def scheduled(**changes) -> dict:
    return {"optimizer": Optimizer(Schedule(**changes))}


def optimized(**changes) -> dict:
    return {"optimizer": Optimizer(Schedule(), **changes)}


def stepped(*milestones: tuple[float, float]) -> dict:
    return scheduled(kind="multistep", milestones=milestones)


def kept(**changes) -> dict:
    return {"checkpoints": Checkpoints(**changes)}


def reading(sources: tuple[Source, ...] = (Source("x"),), length: int = 16, **changes) -> dict:
    return {"data": Data(sources, sequence_length=length, **changes)}


MIXTURE = (Source("x"), Source("y", 0.5))
TINY = 5e-324

MAMBA = ModelConfig(64, 16, 1, 0, 32, mixer="mamba", state_size=4, step_rank=3, conv_width=3)

# What is just allowed, and what is just not; a recipe of small() has 6,400 tokens in 100 steps of 4 x 16.
BOUNDS = {
    "name": ({"name": "x"}, {"name": ""}),
    "data.sources: every weight": (reading((Source("x", TINY),)), reading((Source("x"), Source("y", 0.0)))),
    "data.order='chunks'": (reading(order="chunks"), reading(MIXTURE, order="chunks")),
    "data.sources is empty": (reading(MIXTURE), reading(())),
    "data.sequence_length must": (reading(length=1), reading(length=0)),
    "data.sequence_length=17": (reading(length=16), reading(length=17)),
    "batch.sequences must": ({"batch": Batch(1)}, {"batch": Batch(0)}),
    "batch.accumulation must": ({"batch": Batch(4, 1)}, {"batch": Batch(4, 0)}),
    "batch.sequences=4 must be a multiple of batch.accumulation=8": ({"batch": Batch(4, 4)}, {"batch": Batch(4, 8)}),
    "tokens=63": ({"tokens": 64}, {"tokens": 63}),
    "optimizer.schedule.peak": (scheduled(peak=TINY, final=0.0), scheduled(peak=0.0, final=0.0)),
    "optimizer.schedule.final": (scheduled(peak=1e-3, final=1e-3), scheduled(peak=1e-3, final=1.1e-3)),
    "schedule.final must lie between 0": (scheduled(final=0.0), scheduled(final=-TINY)),
    "warmup_tokens=6401": (scheduled(warmup_tokens=6400), scheduled(warmup_tokens=6401)),
    "warmup_tokens=-1": (scheduled(warmup_tokens=0), scheduled(warmup_tokens=-1)),
    "decay_tokens must be positive": (scheduled(kind="wsd", decay_tokens=1), scheduled(kind="wsd", decay_tokens=0)),
    "decay_tokens must be positive and fit": (
        scheduled(kind="wsd", warmup_tokens=400, decay_tokens=6000),
        scheduled(kind="wsd", warmup_tokens=400, decay_tokens=6001),
    ),
    "milestones must have ascending": (stepped((0.5, 0.1), (0.6, 0.0)), stepped((0.6, 0.1), (0.5, 0.0))),
    "milestones must have ascending shares between 0": (stepped((TINY, 1.0)), stepped((0.0, 1.0))),
    "shares between 0 and 1": (stepped((1 - 1e-9, 1.0)), stepped((1.0, 1.0))),
    "milestones must not have negative": (stepped((0.5, 0.0)), stepped((0.5, -TINY))),
    "beta1": (optimized(beta1=0.0), optimized(beta1=-TINY)),
    "beta1 must": (optimized(beta1=1 - 1e-9), optimized(beta1=1.0)),
    "beta2": (optimized(beta2=0.0), optimized(beta2=-TINY)),
    "beta2 must": (optimized(beta2=1 - 1e-9), optimized(beta2=1.0)),
    "optimizer.eps": (optimized(eps=TINY), optimized(eps=0.0)),
    "optimizer.eps=inf": (optimized(eps=1e300), optimized(eps=math.inf)),
    "optimizer.weight_decay": (optimized(weight_decay=0.0), optimized(weight_decay=-TINY)),
    "optimizer.clip_norm=inf": (optimized(clip_norm=1e300), optimized(clip_norm=math.inf)),
    "optimizer.clip_norm": (optimized(clip_norm=TINY), optimized(clip_norm=0.0)),
    "skip_spike_sigmas": (optimized(skip_spike_sigmas=0.0), optimized(skip_spike_sigmas=-TINY)),
    "loss.ignore_token=64": ({"loss": Loss(63)}, {"loss": Loss(64)}),
    "loss.ignore_token=-1": ({"loss": Loss(0)}, {"loss": Loss(-1)}),
    "loss.z_loss": ({"loss": Loss(z_loss=0.0)}, {"loss": Loss(z_loss=-TINY)}),
    "loss.load_balance must": ({"loss": Loss(load_balance=0.0)}, {"loss": Loss(load_balance=-TINY)}),
    "loss.router_z_loss must": ({"loss": Loss(router_z_loss=0.0)}, {"loss": Loss(router_z_loss=-TINY)}),
    "loss.load_balance=0.1 is a loss of experts": ({}, {"loss": Loss(load_balance=0.1)}),
    "loss.router_z_loss=0.1 is a loss of experts": (
        {"loss": Loss(load_balance=0.1, router_z_loss=0.1), "model": ModelConfig(**M, experts=2, experts_per_token=1)},
        {"loss": Loss(router_z_loss=0.1)},
    ),
    "loss.chunk_tokens": ({"loss": Loss(chunk_tokens=1)}, {"loss": Loss(chunk_tokens=0)}),
    "checkpoints.at_tokens": (kept(at_tokens=(0,)), kept(at_tokens=(5, -1))),
    "checkpoints.latest_every_tokens": (kept(latest_every_tokens=0), kept(latest_every_tokens=-1)),
    "checkpoints.every: tokens": (kept(every=(Every(1),)), kept(every=(Every(0),))),
    "a rule without until must be the last": (kept(every=(Every(2, 9), Every(3))), kept(every=(Every(2), Every(3, 9)))),
    "the until values must ascend": (
        kept(every=(Every(2, 9), Every(3, 10))),
        kept(every=(Every(2, 9), Every(3, 9))),
    ),
    "the until values must": (kept(every=(Every(2, 1),)), kept(every=(Every(2, 0),))),
    "mesh: every axis": ({"mesh": MeshShape(1, -1, 1)}, {"mesh": MeshShape(0, -1, 1)}),
    "mesh: every axis is": ({"mesh": MeshShape(-1, 1, 1)}, {"mesh": MeshShape(1, -2, 1)}),
    "mesh: every axis is at least 1": ({"mesh": MeshShape(1, 1, -1)}, {"mesh": MeshShape(1, 1, 0)}),
    "mesh: at most one": ({"mesh": MeshShape(2, -1, 2)}, {"mesh": MeshShape(-1, -1, 1)}),
    "model.heads=2 is not a multiple of mesh.tensor=4": ({"mesh": MeshShape(tensor=2)}, {"mesh": MeshShape(tensor=4)}),
    "model.kv_heads=1": (
        {"mesh": MeshShape(tensor=1), "model": ModelConfig(**M, kv_heads=1)},
        {"mesh": MeshShape(tensor=2), "model": ModelConfig(**M, kv_heads=1)},
    ),
    "model.mlp_width=33": (
        {"mesh": MeshShape(tensor=2)},
        {"mesh": MeshShape(tensor=2), "model": ModelConfig(**{**M, "mlp_width": 33})},
    ),
    "logging.every_steps": ({"logging": Logging(every_steps=1)}, {"logging": Logging(every_steps=0)}),
    "logging.profile_start_step must": ({}, {"logging": Logging(profile_start_step=-1)}),
    "logging.profile_start_step=100": (
        {"logging": Logging(profile_start_step=99, profile_steps=5)},
        {"logging": Logging(profile_start_step=100, profile_steps=1)},
    ),
    "logging.profile_steps": ({"logging": Logging(profile_start_step=100)}, {"logging": Logging(profile_steps=-1)}),
    "batch.schedule.1.1 must": (
        {"batch": Batch(4, schedule=((1, 2), (2, 1)))},
        {"batch": Batch(4, schedule=((1, 2), (2, 0)))},
    ),
    "batch.schedule.0.1=3 must be a multiple of batch.accumulation=2": (
        {"batch": Batch(4, 2, ((1, 6),))},
        {"batch": Batch(4, 2, ((1, 3),))},
    ),
    "batch.schedule: its tokens must be positive and ascend": (
        {"batch": Batch(4, schedule=((1, 2), (2, 4)))},
        {"batch": Batch(4, schedule=((2, 2), (2, 4)))},
    ),
    "batch.schedule: its tokens": (
        {"batch": Batch(4, schedule=((1, 2),))},
        {"batch": Batch(4, schedule=((0, 2),))},
    ),
    "batch.schedule: 6400 tokens are not before the end, tokens=6400": (
        {"batch": Batch(4, schedule=((6399, 2),))},
        {"batch": Batch(4, schedule=((6400, 2),))},
    ),
    "data.mask_documents_at=64 is no id": (
        {"data": Data((Source("x"),), 16, mask_documents_at=63)},
        {"data": Data((Source("x"),), 16, mask_documents_at=64)},
    ),
    "data.mask_documents_at=2 masks attention, and the state of model.mixer='mamba' crosses documents": (
        {"data": Data((Source("x"),), 16, mask_documents_at=2)},
        {"data": Data((Source("x"),), 16, mask_documents_at=2), "model": MAMBA},
    ),
    "logging.validation.0.windows": (
        {"logging": Logging(validation=(Validation(windows=0),))},
        {"logging": Logging(validation=(Validation(windows=-1),))},
    ),
    "logging.validation.1.name='a.b'": (
        {"logging": Logging(validation=(Validation("a.b"), Validation("a-b")))},
        {"logging": Logging(validation=(Validation("a.b"), Validation("a.b")))},
    ),
    "logging.validation.0.name='a/b'": (
        {"logging": Logging(validation=(Validation("a_b"),))},
        {"logging": Logging(validation=(Validation("a/b"),))},
    ),
    "logging.peak_tflops": ({"logging": Logging(peak_tflops=0.0)}, {"logging": Logging(peak_tflops=-1.0)}),
    "logging.wandb_project": ({"logging": Logging(wandb_project=None)}, {"logging": Logging(wandb_project="")}),
    "compute.micro_gradient_norm": (
        {"batch": Batch(4, 2), "compute": Compute(micro_gradient_norm=True)},
        {"batch": Batch(4, 1), "compute": Compute(micro_gradient_norm=True)},
    ),
    "seed=-1": ({"seed": 0}, {"seed": -1}),
    "seed=4294967296": ({"seed": 4294967295}, {"seed": 4294967296}),
}  # fmt: skip


@pytest.mark.parametrize("message", BOUNDS)
def test_the_last_value_that_can_be_is_taken_and_the_next_refused_by_name(message):
    good, bad = BOUNDS[message]
    small(**good)
    with pytest.raises(UserError) as error:
        small(**bad)
    assert str(error.value).startswith("recipe ") and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sed", 1, "unknown field sed"),
        ("seed", "one", "seed: Input should be a valid integer"),
        ("tokens", 1, "tokens=1 is less than one step"),
    ],
)
def test_a_bad_recipe_file_is_refused_by_file_and_field(tmp_path, key, value, message):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(json.loads(to_json(small())) | {key: value}))
    with pytest.raises(UserError, match=message) as error:
        from_json(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_part_in_the_place_of_another_is_refused_by_name():
    """As of positional arguments: the eighth of Recipe is loss, and Compute was meant for another."""
    with pytest.raises(UserError, match=r"recipe small: loss is a Compute; give a Loss, by loss=…"):
        small(loss=Compute())
    with pytest.raises(UserError, match=r"recipe small: data is a str; give a Data, by data=…"):
        small(data="books")


def test_a_recipe_file_cut_off_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(to_json(small())[:100])
    with pytest.raises(UserError, match=r"Invalid JSON.*delete it where it is a run's") as error:
        from_json(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


EVERYTHING = small(
    name="all",
    model=ModelConfig(**M, kv_heads=1, experts=3, experts_per_token=2),
    data=Data((Source("x", 0.3), Source("ÿ", 2.0)), 8, "shuffle", 5),
    batch=Batch(6, 3, ((500, 12), (1000, 3)), "linear"),
    optimizer=Optimizer(
        Schedule(2e-3, 1e-3, 100, "multistep", 7, ((0.1, 0.5), (0.4, 0.0))),
        0.8, 0.85, 1e-6, 0.2, "matrices", 0.5, True, 4.0,
    ),
    tokens=9001,
    checkpoints=Checkpoints(False, (5, 6), (Every(7, 700), Every(9)), 77, "float32", 3),
    loss=Loss(3, 1e-4, 0.01, 0.001, 33),
    mesh=MeshShape(2, 3, 1),
    compute=Compute("float32", "splash", "offload", False, True),
    logging=Logging(3, False, "p", 1, 2, (Validation("a", "b", "c", 3), Validation("d")), 1.5),
    seed=11,
)  # fmt: skip


def test_a_recipe_without_a_single_default_comes_back_from_its_file(tmp_path):
    def leaves(value) -> list:
        return [leaf for item in value.values() for leaf in leaves(item)] if isinstance(value, dict) else [value]

    path = tmp_path / "recipe.json"
    path.write_text(to_json(EVERYTHING), encoding="utf-8")
    assert from_json(path) == EVERYTHING
    assert len(leaves(json.loads(path.read_text()))) == len(leaves(dataclasses.asdict(EVERYTHING)))
    defaults = small()
    for part in ("loss", "mesh", "compute", "logging", "checkpoints", "optimizer", "data", "batch"):
        ours, usual = dataclasses.asdict(getattr(EVERYTHING, part)), dataclasses.asdict(getattr(defaults, part))
        same = [name for name in ours if ours[name] == usual[name]]
        assert same == {"mesh": ["tensor"], "data": ["order"]}.get(part, []), part


def test_fields_left_out_of_a_file_have_the_stated_defaults(tmp_path):
    least = json.loads(to_json(small()))
    for name in ("checkpoints", "loss", "mesh", "compute", "logging", "seed"):
        del least[name]
    least |= {"optimizer": {"schedule": {}}, "batch": {"sequences": 4}}
    least["data"] = {"sources": [{"path": "x"}], "sequence_length": 16}
    (tmp_path / "recipe.json").write_text(json.dumps(least))
    recipe = dataclasses.asdict(from_json(tmp_path / "recipe.json"))
    assert recipe["optimizer"] == {
        "schedule": {
            "peak": 3e-4, "final": 3e-5, "warmup_tokens": 0, "kind": "cosine", "decay_tokens": 0,
            "milestones": ((0.8, 0.316), (0.9, 0.1)),  # DeepSeek LLM (2401.02954), section 3.2: 31.6 % and 10 %
        },
        "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "decay": "all", "clip_norm": 1.0,
        "skip_nonfinite": False, "skip_spike_sigmas": 0.0,
    }  # fmt: skip
    assert recipe["data"] == {
        "sources": ({"path": "x", "weight": 1.0},), "sequence_length": 16, "order": "shuffle",
        "mask_documents_at": None,
    }  # fmt: skip
    assert recipe["batch"] == {"sequences": 4, "accumulation": 1, "schedule": (), "learning_rate_rule": "fixed"}
    assert recipe["checkpoints"] == {
        "initial": True, "at_tokens": (), "every": (), "latest_every_tokens": 0, "keep": "state", "state_every": 0,
    }  # fmt: skip
    assert recipe["loss"] == {
        "ignore_token": None, "z_loss": 0.0, "load_balance": 0.0, "router_z_loss": 0.0, "chunk_tokens": 1024,
    }  # fmt: skip
    assert recipe["mesh"] == {"replica": 1, "fsdp": -1, "tensor": 1}
    assert recipe["compute"] == {
        "dtype": "bfloat16", "attention": "auto", "remat": "full", "scan_layers": True, "micro_gradient_norm": False,
    }  # fmt: skip
    assert recipe["logging"] == {
        "every_steps": 1, "tensorboard": True, "wandb_project": None, "profile_start_step": 0, "profile_steps": 0,
        "validation": ({"name": "held_out", "path": None, "split": "validation", "windows": 64},), "peak_tflops": 0.0,
    }  # fmt: skip
    assert recipe["seed"] == 0 and Data((Source("x"),)).sequence_length == 2048


STAGES = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 40)), max_size=4, unique_by=lambda stage: stage[0])


@given(
    stages=STAGES,
    first=st.integers(1, 40),
    tokens=st.integers(1, 3000),
    milestones=st.lists(st.integers(0, 3500), max_size=4),
    every=st.integers(50, 900),
    begin=st.integers(0, 60),
    asked=st.integers(0, 3500),
)
@example(stages=[(64, 2), (128, 1)], first=4, tokens=300, milestones=[128], every=64, begin=3, asked=128)  # met exactly
def test_steps_tokens_and_kept_steps_under_a_schedule_of_batches_are_those_of_counting(
    stages, first, tokens, milestones, every, begin, asked
):
    """Step by step: the batch is that of the last border that the tokens behind it have reached. A clock that begins
    at any step of the run goes on alike."""
    schedule = tuple(sorted(stages))
    tokens += max([16 * first, *(border for border, _ in schedule)])
    checkpoints = Checkpoints(True, tuple(milestones), (Every(every),))
    recipe = small(batch=Batch(first, schedule=schedule), tokens=tokens, checkpoints=checkpoints)
    counted, batches = [0], []
    while counted[-1] < max(tokens, asked, *milestones) + 16 * 40:
        stage = [sequences for border, sequences in ((0, first), *schedule) if border <= counted[-1]]
        batches.append(stage[-1])
        counted.append(counted[-1] + 16 * batches[-1])
    last = sum(one <= tokens for one in counted) - 1
    at_least = lambda wanted: next(step for step, one in enumerate(counted) if one >= wanted)
    kept = {0, last} | {at_least(wanted) for wanted in (*milestones, *range(every, tokens + 1, every))}
    begin = min(begin, last)
    clock = Clock(recipe, begin, counted[begin])
    assert (recipe.steps, clock.last_step) == (last, last)
    assert recipe.kept_steps() == tuple(sorted(step for step in kept if step <= last))
    later = lambda kept: [step for step in kept if step > begin]  # the step where it begins is a checkpoint already
    assert later(clock.kept_steps()) == later(recipe.kept_steps())
    steps = range(begin, last + 1)
    assert [clock.tokens_at(step) for step in steps] == counted[begin : last + 1]
    assert [clock.sequences_at(step) for step in steps] == batches[begin : last + 1]
    assert clock.step_at(max(asked, counted[begin])) == at_least(max(asked, counted[begin]))


@pytest.mark.parametrize(
    ("rule", "factors"), [("fixed", [1, 1, 1]), ("square_root", [1, 2, 0.5]), ("linear", [1, 4, 0.25])]
)
def test_the_learning_rate_follows_the_batch_by_its_rule(rule, factors):
    batch = Batch(8, schedule=((500, 32), (1000, 2)), learning_rate_rule=rule)
    recipe = small(batch=batch, optimizer=Optimizer(Schedule(peak=1e-3, warmup_tokens=1000)))
    plain = dataclasses.replace(recipe, batch=Batch(8))
    for tokens, factor in zip((499, 500, 1000), factors):
        assert learning_rate(recipe, tokens) == pytest.approx(factor * learning_rate(plain, tokens), rel=1e-12)


def rolling_steps(recipe: Recipe) -> list[int]:
    clock = Clock(recipe)
    return [step for step in range(clock.last_step + 1) if clock.is_rolling(step)]


@pytest.mark.parametrize(
    ("tokens", "steps"),
    # Steps of 64 tokens: the first behind each multiple; 0: none.
    [
        (0, []),
        (1, [1, 2, 3, 4, 5, 6]),
        (64, [1, 2, 3, 4, 5, 6]),
        (65, [2, 3, 4, 5, 6]),
        (128, [2, 4, 6]),
        (150, [3, 5]),
    ],
)
def test_a_rolling_checkpoint_is_the_first_step_with_another_multiple_of_its_tokens(tokens, steps):
    assert rolling_steps(small(tokens=6 * 64, checkpoints=Checkpoints(latest_every_tokens=tokens))) == steps


def test_rolling_checkpoints_are_as_many_tokens_apart_whatever_the_batch():
    """Steps of 32 tokens, of 64 from 128 tokens on, of 16 from 512 on."""
    batch = Batch(2, schedule=((128, 4), (512, 1)))
    recipe = small(tokens=1024, batch=batch, checkpoints=Checkpoints(latest_every_tokens=256))
    assert [Clock(recipe).tokens_at(step) for step in rolling_steps(recipe)] == [256, 512, 768, 1024]


@pytest.mark.parametrize(
    ("keep", "every", "weights_only"),
    [("state", 0, ()), ("float32", 0, (0, 1, 2, 3, 4, 5)), ("bfloat16", 2, (0, 1, 3, 5)), ("float32", 1, (0,))],
)
def test_weights_alone_are_kept_but_of_every_nth_and_the_last(keep, every, weights_only):
    rules = Checkpoints(every=(Every(64),), latest_every_tokens=64, keep=keep, state_every=every)
    assert Clock(small(tokens=6 * 64, checkpoints=rules)).weights_only_steps() == weights_only


def test_a_run_that_could_not_resume_is_refused():
    with pytest.raises(UserError, match=r"checkpoints.keep=float32 leaves nothing to resume from"):
        small(checkpoints=Checkpoints(keep="float32"))


@pytest.mark.parametrize(("tokens", "steps"), [(64, 1), (127, 1), (128, 2), (6400, 100), (6463, 100)])
def test_a_run_has_the_whole_steps_that_its_tokens_make(tokens, steps):
    recipe = small(tokens=tokens)
    assert (recipe.tokens_per_step, recipe.steps) == (64, steps)
    assert recipe.kept_steps() == (0, steps)


@pytest.mark.parametrize(
    ("checkpoints", "steps"),
    [
        (Checkpoints(False), (100,)),
        (Checkpoints(at_tokens=(64, 129, 6336, 6337, 6401)), (0, 1, 3, 99, 100)),
        (Checkpoints(False, (0,)), (0, 100)),
        # Of 128 tokens up to and with 640; then multiples of 960, the first behind that.
        (Checkpoints(False, every=(Every(128, 640), Every(960, 2880))), (2, 4, 6, 8, 10, 15, 30, 45, 100)),
        (Checkpoints(False, every=(Every(1280, 1280), Every(640))), (20, *range(30, 101, 10))),
        (Checkpoints(False, every=(Every(3200, 1_000_000),)), (50, 100)),
    ],
)
def test_kept_steps_by_hand(checkpoints, steps):
    assert small(checkpoints=checkpoints).kept_steps() == steps


def test_the_tokenizer_of_a_source_lies_in_its_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert Source("~/data").tokenizer == Path("/home/me/data/tokenizer")


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: No such file or directory; give a recipe's JSON file"):
        from_json(tmp_path / "none.json")


def test_an_unknown_field_is_found_wherever_it_is(tmp_path):
    values = json.loads(to_json(small()))
    values["data"]["sources"][0]["wieght"] = 2.0
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"unknown field data\.sources\.0\.wieght"):
        from_json(tmp_path / "recipe.json")


def test_differences_of_tuples_name_the_place_and_what_is_only_in_one():
    assert differences(EVERYTHING, EVERYTHING) == []
    changed = dataclasses.replace(
        EVERYTHING,
        data=Data((Source("x", 0.3),), 8, "shuffle", 5),
        checkpoints=Checkpoints(False, (5, 6, 8), (Every(7, 700), Every(9)), 77, "float32", 3),
    )
    assert differences(EVERYTHING, changed) == [
        "data.sources.1.path: 'ÿ' -> None",
        "data.sources.1.weight: 2.0 -> None",
        "checkpoints.at_tokens.2: None -> 8",
    ]


def test_differences_name_the_fields():
    changed = dataclasses.replace(small(), seed=1, batch=Batch(8))
    assert differences(small(), changed) == ["batch.sequences: 4 -> 8", "seed: 0 -> 1"]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"did you mean 'llama_60m'\? known: .*open_llama_7b"):
        find_config("lama_60m", "{}.py", "recipe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def recipe():\n    return 3\n", r"mine\.py: recipe\(\) returned int"),
        ("def recipe():\n    return 3 / 0\n", r"mine\.py:2: ZeroDivisionError: division by zero; correct the file"),
        ("def recipe(:\n", r"mine\.py: SyntaxError"),
        ("recipe = 3\n", r"mine\.py: has no function recipe\(\)"),
    ],
)
def test_a_recipe_file_with_a_mistake_is_named(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))


if __name__ == "__main__":
    for recipe_name in RECIPES:
        (GOLDEN / f"{recipe_name}.json").write_text(to_json(load_recipe(recipe_name)))
