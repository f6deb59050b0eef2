"""lm-eval both ways: it asks our engine, and our scores become its files; both as if it had run its own backend."""

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import start
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from scoring_examples import score_series, sentence, write_benchmarks, write_tokenizer
from series_examples import CONFIG, fresh_params, make_series, one_device
from transformers import AutoTokenizer

from fineline_jax import prepare_pack
from fineline_jax.checkpoints.formats.huggingface import export_hf
from fineline_jax.checkpoints.open import open_series
from fineline_jax.errors import UserError
from fineline_jax.models import attention, decoder
from fineline_jax.scoring import score_files
from fineline_jax.scoring.lm_eval import backend, export
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.requests import pack, suite, tasks
from fineline_jax.trajectories.table import read_table

SUITE = "piqa@1,arc_easy,winogrande,lambada_openai,wikitext,truthfulqa_mc2"


def trained(tokenizer: Path, steps: int = 120) -> decoder.Params:
    """A model of CONFIG that has read sentences of the words of the documents, so that it is sure of some things."""
    rng, encode = random.Random(2), AutoTokenizer.from_pretrained(tokenizer).encode
    read = re.compile("runs|dog|house|under|two")  # so that " cat" is what is likely next
    stream = [token for _ in range(1500) for token in encode(read.sub("cat", sentence(rng)))]
    windows = np.array(stream[: len(stream) // 33 * 33]).reshape(-1, 33)

    def loss(params: decoder.Params, batch: jax.Array) -> jax.Array:
        places = jnp.broadcast_to(jnp.arange(32), batch[:, 1:].shape)
        attend = attention.causal("xla")
        hidden = decoder.hidden_states(CONFIG, params, batch[:, :-1], places, attend)
        logits = jnp.einsum("bsd,dv->bsv", hidden, decoder.head_weight(CONFIG, params))
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch[:, 1:], CONFIG.vocab_size)).mean()

    adam = optax.adam(1e-2)

    @jax.jit
    def run(params: decoder.Params) -> tuple[decoder.Params, jax.Array]:
        def step(state: tuple, batch: jax.Array) -> tuple[tuple, jax.Array]:
            value, grads = jax.value_and_grad(loss)(state[0], batch)
            updates, moments = adam.update(grads, state[1])
            return (optax.apply_updates(state[0], updates), moments), value

        (params, _), losses = jax.lax.scan(step, (params, adam.init(params)), batches)
        return params, losses

    with jax.set_mesh(one_device()):
        batches = jnp.array(windows[np.random.default_rng(0).integers(0, len(windows), (steps, 16))], jnp.int32)
        params, losses = run(fresh_params(2))
    assert losses[0] > 5.5 and losses[-1] < 3
    return params


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A series of two, of which the second has been trained, the documents and the pack."""
    place = tmp_path_factory.mktemp("lm_eval")
    tokenizer = write_tokenizer(place / "tokenizer", adds_bos=True)
    benchmarks = write_benchmarks(place / "benchmarks", documents=7)
    make_series(place / "run", tokenizer, (1,))
    params = trained(tokenizer)
    with jax.set_mesh(one_device()):
        export_hf(CONFIG, params, place / "run/step2", tokenizer)
    prepare_pack(SUITE, tokenizer, place / "pack", benchmarks=benchmarks)
    return place


@pytest.fixture(scope="module")
def exported(place) -> dict[str, Path]:
    """The results file of each checkpoint."""
    made = pack.load(place / "pack")
    score_series(open_series(str(place / "run")), made, place / "scores", one_device())
    found = export.export(place / "scores", place / "exported", made)
    return {json.loads(path.read_text())["config"]["model_revision"]: path for path in found}


def evaluate(place: Path, model: Any, **options: Any) -> dict[str, Any]:
    import lm_eval

    names = SUITE.replace("@1", "")
    loaded, _groups = tasks.load_tasks(suite.open_suite(SUITE), tasks.local_folder(place / "benchmarks"))
    assert [task.name for task in loaded] == names.split(",")
    definitions = {task.name: task.definition for task in loaded}
    result = lm_eval.evaluate(model, {"tasks": definitions}, bootstrap_iters=100_000, **options)
    assert result is not None
    return dict(result)


@pytest.fixture(scope="module")
def theirs(place) -> dict[str, Any]:
    """What lm-eval's own Hugging Face backend gives for the second checkpoint."""
    pytest.importorskip("torch", reason="pip install -e '.[test]'")
    pytest.importorskip("accelerate", reason="pip install -e '.[test]'")  # of lm-eval's torch backend
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(place / "run/step2"), dtype="float32", device="cpu", batch_size=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")  # its bootstrap would fork beside JAX's threads
        return evaluate(place, model, log_samples=True)


def same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal keys everywhere, numbers to 1e-4, all else equal."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            same(one, other, f"{where}/{place}")
    elif isinstance(theirs, float):
        assert float(ours) == pytest.approx(theirs, rel=1e-4, abs=1e-4, nan_ok=True), where
    elif where.endswith("/alias"):
        assert ours.strip() == theirs.strip()
    else:
        assert ours == theirs, where


def as_json(value: Any) -> Any:
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(value, default=handle_non_serializable)
    return json.loads(re.sub(r" at 0x[0-9a-f]+", "", text))  # functions in the definitions of tasks


def test_our_engine_behind_lm_eval_gives_the_results_of_its_own_backend(place, theirs, monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    model = backend.FinelineLM(str(place / "run"), revision="step2")
    ours = evaluate(place, model, log_samples=True)
    for key in ("results", "n-samples", "n-shot", "versions", "higher_is_better"):
        same(as_json(ours[key]), as_json(theirs[key]), key)
    for task in theirs["samples"]:
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            same(as_json(one["resps"]), as_json(other["resps"]), task)


def test_a_trained_model_has_the_log_likelihoods_and_the_accuracies_of_lm_evals_own_backend(exported, place, theirs):
    """Within 1e-4 per request, the same greedy flags, and every document answered alike."""
    found = score_files.read(place / "scores/run/step2.parquet")
    expected = [response[0] for name in theirs["samples"] for s in theirs["samples"][name] for response in s["resps"]]
    single = [answer if isinstance(answer, tuple) else (answer, None) for answer in expected]
    assert len(single) == len(found.loglikelihood) > 90
    np.testing.assert_allclose(found.loglikelihood, [ll for ll, _ in single], rtol=0, atol=1e-4)
    flags = [
        (bool(ours), bool(other)) for ours, (_, other) in zip(found.is_greedy, single, strict=True) if other is not None
    ]
    assert all(ours == other for ours, other in flags) and {ours for ours, _ in flags} == {True, False}
    values = tidy.of_tasks(pack.load(place / "pack"), found.loglikelihood, found.is_greedy)
    for name, row in theirs["results"].items():
        for key in ("acc", "acc_norm"):
            if f"{key},none" in row:
                exact = 1e-6 if name == "truthfulqa_mc2" else 0  # mc2 is a share of probability, no count
                assert values[name][key].value == pytest.approx(row[f"{key},none"], abs=exact, rel=0), (name, key)
                assert values[name][key].stderr == pytest.approx(row[f"{key}_stderr,none"], abs=exact, rel=1e-14)


def test_exported_results_are_those_of_an_lm_eval_run(exported, theirs):
    found = as_json(json.loads(exported["step2"].read_text()))
    for key in ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples"):
        same(found[key], as_json(theirs[key]), key)
    assert found["lm_eval_version"] and found["config"]["fewshot_seed"] == 1234


def test_exported_samples_are_those_of_an_lm_eval_run(exported, theirs, tmp_path):
    """lm-eval's tracker writes its own samples, and the lines are held against ours."""
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.log_experiment_args("hf", "pretrained=x", None, None, False)
    tracker.save_results_aggregated(as_json({"results": {}}), theirs["samples"])
    hashes = json.loads(next(tmp_path.glob("x/results_*.json")).read_text())["task_hashes"]
    assert json.loads(exported["step2"].read_text())["task_hashes"] == hashes
    for task, samples in theirs["samples"].items():
        tracker.save_results_samples(task, [dict(sample) for sample in samples])
        [reference] = tmp_path.glob(f"x/samples_{task}_*.jsonl")
        [ours] = exported["step2"].parent.glob(f"samples_{task}_*.jsonl")
        lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (ours, reference)]
        for one, other in zip(*lines, strict=True):
            for key in ("resps", "filtered_resps"):
                one[key], other[key] = (json.loads(json.dumps(line[key]), parse_float=float) for line in (one, other))
                same(numbers(one.pop(key)), numbers(other.pop(key)), f"{task}/{key}")
            same(one, other, task)


def numbers(value: Any) -> Any:
    """lm-eval writes log-likelihoods as text."""
    if isinstance(value, list):
        return [numbers(item) for item in value]
    try:
        return float(value)
    except ValueError:
        return value


def test_lm_evals_own_tools_read_what_is_exported(exported):
    import datasets
    from lm_eval.utils import get_latest_filename, get_results_filenames, get_sample_results_filenames, make_table

    folder = exported["step2"].parent
    names = [str(path) for path in folder.iterdir()]
    latest = get_latest_filename(get_results_filenames(names))
    assert "|piqa" in make_table(json.loads(Path(latest).read_text()))
    assert len(get_sample_results_filenames(names)) == len(SUITE.split(","))
    [piqa] = folder.glob("samples_piqa_*.jsonl")
    samples = datasets.Dataset.from_json(str(piqa))
    assert samples.num_rows == 7 and {"doc_hash", "resps", "acc_norm"} <= set(samples.column_names)


def test_analyze_reads_what_is_exported(exported, place):
    table = read_table(exported["step1"].parents[1], tokens_per_step=1000)
    assert set(table["checkpoint"]) == {"step1", "step2"} and set(table["series"]) == {"run"}
    assert set(table["tokens"]) == {1000, 2000}
    own = scorer_table(place)
    row = table[(table.checkpoint == "step2") & (table.task == "arc_easy") & (table.metric == "acc_norm")]
    same = own[(own.checkpoint == "step2") & (own.task == "arc_easy") & (own.metric == "acc_norm")]
    assert row.value.item() == same.value.item() and row.stderr.item() == same.stderr.item()


def scorer_table(place: Path) -> Any:
    return tidy.tidy(place / "scores")


def answer(context: str, continuation: str) -> tuple[float, bool]:
    """A log-likelihood that any one can work out."""
    number = int(hashlib.sha256(f"{context}|{continuation}".encode()).hexdigest()[:8], 16)
    return -(number % 10_007) / 100, number % 3 == 0


class Oracle(LM):
    def loglikelihood(self, requests):
        return [answer(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise AssertionError

    def generate_until(self, requests):
        raise AssertionError


@pytest.mark.slow
def test_groups_and_their_weights_are_those_of_lm_eval(shared_data, place, tmp_path):
    """MMLU: 57 subjects in four fields, of three documents each."""
    import lm_eval

    benchmarks = shared_data / "benchmarks"
    made = prepare_pack("mmlu@1,piqa", place / "tokenizer", tmp_path / "pack", benchmarks=benchmarks, limit=3)
    contexts = made.contexts["text"].to_pylist()
    texts = made.requests["text"].to_pylist()
    answers = [answer(contexts[row], text) for row, text in zip(made.request_context, texts, strict=True)]
    key = score_files.Key("w", made.hash, "float32", "auto", "oracle")
    header = score_files.Header("org/model", "main", None, 5, 64, key)
    score_files.keep_pack(tmp_path / "scores", made)
    score_files.write(
        tmp_path / "scores",
        score_files.Scores(
            header, np.array([value for value, _ in answers]), np.array([greedy for _, greedy in answers])
        ),
    )
    [exported] = export.export(tmp_path / "scores", tmp_path / "out", made, samples=False)
    ours = as_json(json.loads(exported.read_text()))
    loaded, groups = tasks.load_tasks(suite.open_suite("mmlu@1,piqa"), tasks.local_folder(benchmarks))
    given = {"tasks": {t.name: t.definition for t in loaded}, "groups": {g.name: g.definition for g in groups}}
    theirs = as_json(lm_eval.evaluate(Oracle(), given, limit=3, log_samples=False))
    for counts in theirs["n-samples"].values():
        counts["original"] = 3  # with --limit, the pack does not know how many there were
    for name in ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert ours[name] == theirs[name], name
    table = read_table(tmp_path / "out")
    assert set(table["tokens"]) == {5} and set(table["series"]) == {"model"} and table["task"].nunique() == 58


def test_a_second_export_replaces_the_first(exported, place, tmp_path):
    first = export.export(place / "scores", tmp_path, samples=False)
    second = export.export(place / "scores", tmp_path, samples=False)
    assert [path.exists() for path in first] == [False, False] and all(path.exists() for path in second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run__step1", "run__step2"]
    assert [len(list(path.parent.iterdir())) for path in second] == [1, 1]


def test_a_task_that_generates_and_a_checkpoint_not_named_are_refused(place):
    with pytest.raises(UserError, match=r"has 2 checkpoints, give revision=NAME; known: step1, step2"):
        backend.FinelineLM(str(place / "run"))
    with pytest.raises(UserError, match="none is called 'step3'"):
        backend.FinelineLM(str(place / "run"), revision="step3")
    model = object.__new__(backend.FinelineLM)
    request = Instance("generate_until", {}, ("Q:", {}), 0, metadata=("gsm8k", 0, 1))
    with pytest.raises(UserError, match="generates no text; leave out gsm8k"):
        model.generate_until([request])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"pretrained": "x", "trust_remote_code": True},
            "has no argument trust_remote_code; known: pretrained, revision",
        ),
        ({}, "give --model_args pretrained=RUN"),
        ({"pretrained": "x", "dtype": "float16"}, "dtype=float16 must be float32 or bfloat16"),
        ({"pretrained": "x", "max_length": 0}, "max_length=0 must be at least 1"),
        ({"pretrained": "x", "batch_tokens": 0}, "batch_tokens=0 must be at least 1"),
    ],
)
def test_wrong_model_arguments_are_told_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        backend.FinelineLM(**arguments)


@pytest.fixture
def asked(monkeypatch) -> list[dict[str, Any]]:
    """What the engine is given; it answers -0.5, -1.5, …, every second one greedy."""
    calls = []

    def make_scorer(requests, config, mesh, dtype, **options):
        calls.append({"requests": requests, "dtype": dtype, "mesh": mesh, "config": config} | options)

        def score(params, advance):
            count = len(requests)
            advance(count)
            return -0.5 - np.arange(count), np.arange(count) % 2 == 0

        return score

    monkeypatch.setattr(backend, "make_scorer", make_scorer)
    return calls


def instances(kind: str, *arguments: tuple, task: str = "t") -> list[Instance]:
    return [Instance(kind, {}, args, 0, metadata=(task, number, 1)) for number, args in enumerate(arguments)]


def test_requests_of_lm_eval_reach_the_engine_once_and_in_order(place, asked):
    model = backend.FinelineLM(str(place / "run"), revision="1", dtype="bfloat16", max_length=40, batch_tokens=256)
    encode, bos = model.tokenizer.encode, model.tokenizer.bos_token_id
    pairs = [("the cat", " runs"), ("", "ice"), ("the cat", " and,"), ("two ", "dog")]
    requests = instances("loglikelihood", *pairs[:2], task="a") + instances("loglikelihood", *pairs[2:], task="b")
    assert model.loglikelihood(requests) == [(-0.5, True), (-1.5, False), (-2.5, True), (-3.5, False)]
    [call] = asked
    made = call["requests"]
    assert (call["dtype"], call["batch_tokens"], call["config"].context) == ("bfloat16", 256, 96)
    assert model.params["embed"].dtype == "bfloat16", "half the memory"
    assert call["context"] == 40 and made.task.tolist() == [0, 0, 1, 1] and not made.is_rolling.any()
    assert made.context_row.tolist() == [0, 1, 0, 2]
    contexts = [made.contexts[i].tolist() for i in range(3)]
    assert len(made.contexts) == 4 and made.contexts[3].tolist() == [bos], "the same context once, and the prefix"
    assert contexts == [encode("the cat"), [bos], encode("two")]
    rest = [made.continuations[i].tolist() for i in range(4)]
    whole = [encode("the cat runs"), [bos, *encode("ice")[1:]], encode("the cat and,"), encode("two dog")]
    assert [contexts[row] + tokens for row, tokens in zip((0, 1, 0, 2), rest, strict=True)] == whole
    assert model.loglikelihood_rolling(instances("loglikelihood_rolling", ("ice",), ("",))) == [-0.5, -1.5]
    made = asked[1]["requests"]
    assert made.is_rolling.all() and len(made.contexts) == 1 and made.contexts[0].tolist() == [bos]
    assert [made.continuations[i].tolist() for i in range(2)] == [encode("ice"), encode("")]
    given = [(("", ""), [5, 6], [7]), (("", ""), [5, 6], [8, 9]), (("", ""), [4], [3])]
    assert model._loglikelihood_tokens(given) == [(-0.5, True), (-1.5, False), (-2.5, True)]
    made = asked[2]["requests"]
    assert [made.contexts[row].tolist() for row in made.context_row] == [[5, 6], [5, 6], [4]]
    assert [made.continuations[i].tolist() for i in range(3)] == [[7], [8, 9], [3]]


def test_a_text_scored_whole_follows_the_prefix_of_its_tokenizer():
    ids = lambda *numbers: np.array(numbers, np.int32)
    made = backend.request_tokens([(ids(5, 6), ids(7)), (None, ids(8, 9))], ["a", "a"], 3)
    assert [made.contexts[row].tolist() for row in made.context_row] == [[5, 6], [3]]


def test_what_lm_eval_asks_of_a_model(place, asked):
    model = backend.FinelineLM(str(place / "run"), revision="step2")
    tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer")
    assert model.max_length == 96 and backend.FinelineLM(str(place / "run/step2"), max_length=7).max_length == 7
    assert (model.eot_token_id, model.prefix_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id) == (1, 0)
    assert model.tokenizer_name == str(place / "run/step2").replace("/", "__")
    assert model.tok_encode("the cat") == model.tok_encode("the cat", True) == tokenizer.encode("the cat")
    assert model.tok_encode("the cat", add_special_tokens=False) == tokenizer.encode("the cat")[1:]
    assert model.get_model_info() == {
        "model_num_parameters": CONFIG.parameters, "model_dtype": "float32", "model_revision": "step2", "model_sha": "",
    }  # fmt: skip
    model.tokenizer.chat_template = "{{ messages[0].content }}</s>{% if add_generation_prompt %}>{% endif %}"
    chat = [{"role": "user", "content": "hi"}]
    assert model.apply_chat_template(chat) == "hi</s>>"
    assert model.apply_chat_template(chat, False) == "hi"  # what is asked goes on where the chat ends
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no such role') }}{% endif %}"
    model.tokenizer.chat_template = refuses + model.tokenizer.chat_template
    assert model.apply_chat_template([{"role": "system", "content": "Be brief."}, *chat]) == "hi</s>>"  # as HFLM
    model.loglikelihood(instances("loglikelihood", ("a", "b")))
    assert asked[0]["context"] == 96 and asked[0]["batch_tokens"] is None


def test_bos_is_put_as_the_argument_says_and_else_as_the_tokenizer_does(place, tmp_path):
    plain = write_tokenizer(tmp_path / "plain", adds_bos=False)
    for folder, argument, expected in (
        (None, None, True), (None, True, True), (None, False, False),
        (plain, None, False), (plain, True, True), (plain, False, False),
    ):  # fmt: skip
        model = backend.FinelineLM(str(place / "run/step1"), tokenizer=folder and str(folder), add_bos_token=argument)
        assert (model.tok_encode("the cat")[0] == 0) == expected, (folder, argument)
        assert (model.encoder.pairs([("the cat", " runs")])[0][0][0] == 0) == expected


def test_small_weights_are_copied_to_every_device(place):
    model = backend.FinelineLM(str(place / "run"), revision="step1")
    assert model.mesh.shape["replica"] == model.mesh.size and model.mesh.shape["fsdp"] == 1
    sharded = backend.FinelineLM(str(place / "run"), revision="step1", fsdp=4, tensor=1, replica=-1)
    assert dict(sharded.mesh.shape) == {"replica": 2, "fsdp": 4, "tensor": 1}


YAML = """
task: tiny
dataset_path: parquet
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metadata: {version: 1.0}
"""


@pytest.mark.slow
def test_the_command_line_of_lm_eval_knows_the_model(place, tmp_path):
    (tmp_path / "tasks").mkdir()
    file = place / "benchmarks/baber__piqa/validation.parquet"
    (tmp_path / "tasks/tiny.yaml").write_text(YAML.replace("FILE", str(file)))
    arguments = [
        "lm-eval", "--model", "fineline", "--model_args", f"pretrained={place}/run,revision=step1,dtype=float32",
        "--tasks", "tiny", "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    process = start(arguments, HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path / "cache"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "|tiny |" in out
    [results] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["model_num_parameters"] == CONFIG.parameters
