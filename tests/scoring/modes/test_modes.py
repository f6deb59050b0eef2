"""The modes olmes and opencompass-ppl against plain restatements of what those tools do."""

import ast
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scoring_examples import score_once, write_benchmarks, write_tokenizer

import fineline_jax
from fineline_jax import prepare_pack
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.modes import mode as modes
from fineline_jax.scoring.modes.names import MODES, find_mode
from fineline_jax.scoring.requests import pack
from fineline_jax.scoring.series import compatibility
from fineline_jax.tokenizers.open import open_tokenizer

SUITE = "piqa@2,arc_easy@1,winogrande"


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"), documents=9)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bpe", adds_bos=False)


def prepared(
    mode: str | None, benchmarks: Path, tokenizer: Path, out: Path, suite: str = SUITE, **options
) -> pack.Pack:
    return prepare_pack(suite, tokenizer, out, benchmarks=benchmarks, mode=mode, **options)


def requests(made: pack.Pack) -> list[tuple[str, str, list[int], list[int]]]:
    """(context, continuation, their tokens) of each request."""
    texts = made.contexts["text"].to_pylist()
    rows = zip(made.request_context, made.requests["text"].to_pylist(), range(made.requests.num_rows), strict=True)
    return [
        (texts[row], text, made.context_tokens[row].tolist(), made.continuation_tokens[i].tolist())
        for row, text, i in rows
    ]


def scores(made: pack.Pack) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    n = made.requests.num_rows
    return -rng.exponential(8.0, n), rng.random(n) < 0.3


def questions(made: pack.Pack, task: str) -> list[tuple[int, list[int]]]:
    """(right choice, requests) of each document."""
    rows = [row for row in made.documents.to_pylist() if row["task"] == task]
    return [(row["gold"][0], list(range(row["first_request"], row["first_request"] + row["requests"]))) for row in rows]


def test_olmes_encodes_context_and_continuation_apart(benchmarks, tokenizer, tmp_path):
    made = prepared("olmes", benchmarks, tokenizer, tmp_path / "p")
    encode = open_tokenizer(tokenizer).encode
    bos = open_tokenizer(tokenizer).bos_token_id
    for context, continuation, head, rest in requests(made):
        assert head == [bos, *encode(context, add_special_tokens=False)]
        assert rest == encode(continuation, add_special_tokens=False)
    assert made.manifest["max_context"] == 2048


@pytest.mark.parametrize(("mode", "tokens"), [("olmes", 64), ("lm-eval", 100)])
def test_olmes_feeds_no_more_than_the_model_takes(mode, tokens, benchmarks, tokenizer, tmp_path):
    made = prepared(mode, benchmarks, tokenizer, tmp_path / "p", "piqa", max_context=100)
    config = ModelConfig(vocab_size=512, width=8, layers=1, heads=1, mlp_width=8, context=64)
    assert compatibility.model_context(made, config) == tokens


def test_olmes_metrics_are_those_of_its_definition(benchmarks, tokenizer, tmp_path):
    """`ICLMetric.compute` of OLMo-in-loop-evals: divided by characters and bytes of " choice"."""
    made = prepared("olmes", benchmarks, tokenizer, tmp_path / "p")
    scored, greedy = scores(made)
    values = tidy.of_tasks(made, scored, greedy)
    asked = requests(made)
    for task, found in values.items():
        raw, per_token, per_char, bits = [], [], [], []
        for gold, rows in questions(made, task):
            texts = [asked[row][1] for row in rows]
            assert all(text[0] == " " for text in texts)
            raw.append(np.argmax(scored[rows]) == gold)
            per_token.append(np.argmax([scored[row] / len(asked[row][3]) for row in rows]) == gold)
            per_char.append(np.argmax([scored[r] / len(t) for r, t in zip(rows, texts, strict=True)]) == gold)
            bits.append(-scored[rows[gold]] / len(texts[gold].encode()) * 1.44269504089)
        assert found["acc_raw"].value == np.mean(raw) and found["acc_per_token"].value == np.mean(per_token)
        assert found["acc_per_char"].value == np.mean(per_char)
        assert found["bits_per_byte"].value == pytest.approx(np.mean(bits))
        assert not {"acc", "acc_norm", "acc_ppl"} & set(found)


def test_olmes_averages_groups_by_task(benchmarks, tokenizer, tmp_path):
    made = prepared("olmes", benchmarks, tokenizer, tmp_path / "p")
    group = {
        "group": "g", "domain": "d", "metric": "acc_raw", "chance": None, "tasks": ["piqa", "arc_easy"],
        "weight_by_size": {}, "weight_others_by_size": False,
    }  # fmt: skip
    # documents of the second task beyond the fifth are left out, so that the tasks differ in size
    tasks = [made.tasks[0], {**made.tasks[1], "documents": 5}]
    grouped = pack.Pack(
        {**made.manifest, "groups": [group], "tasks": tasks}, made.contexts, made.requests, made.documents.slice(0, 14)
    )
    values = tidy.of_tasks(grouped, *scores(made))
    parts = [values[name]["acc_per_char"] for name in ("piqa", "arc_easy")]
    assert parts[0].n != parts[1].n
    assert values["g"]["acc_per_char"].value == pytest.approx((parts[0].value + parts[1].value) / 2)


def test_opencompass_scores_all_tokens_of_prompt_and_choice(benchmarks, tokenizer, tmp_path):
    made = prepared("opencompass-ppl", benchmarks, tokenizer, tmp_path / "p")
    encode = open_tokenizer(tokenizer).encode
    for context, continuation, head, rest in requests(made):
        assert head + rest == encode(context + continuation) and len(head) == 1
    scored, greedy = scores(made)
    values = tidy.of_tasks(made, scored, greedy)
    asked = requests(made)
    for task, found in values.items():
        right, entropy = [], []
        for gold, rows in questions(made, task):
            # _get_ppl: sum over shifted labels / number of tokens
            losses = [-scored[row] / len(encode(asked[row][0] + asked[row][1])) for row in rows]
            right.append(np.argmin(losses) == gold)
            entropy.append(losses[gold])
        assert found["acc_ppl"].value == np.mean(right)
        assert found["cross_entropy"].value == pytest.approx(np.mean(entropy))
        assert set(found) == {"acc_ppl", "cross_entropy"}


def test_without_a_prompt_opencompass_begins_with_the_first_token_of_each_choice(tokenizer, tmp_path):
    """BLiMP has no prompts, and this tokenizer puts nothing before them."""
    pairs = [("the cat runs", "and, very"), ("house two", "the ice")]
    place = tmp_path / "nyu-mll__blimp/adjunct_island"
    place.mkdir(parents=True)
    rows = [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs]
    pq.write_table(pa.Table.from_pylist(rows), place / "train.parquet")
    made = prepared("opencompass-ppl", tmp_path, tokenizer, tmp_path / "p", "blimp_adjunct_island")
    encode = open_tokenizer(tokenizer).encode
    found = [head + rest for _, _, head, rest in requests(made)]
    assert found == [encode(f" {sentence}") for pair in pairs for sentence in pair]
    assert len({tokens[0] for tokens in found}) > 1


def test_the_mode_is_part_of_the_pack_and_of_its_hash(benchmarks, tokenizer, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("{name: s, mode: olmes, tasks: [{task: piqa, shots: 2, metric: acc_norm}]}")
    modes = ("lm-eval", "olmes", "opencompass-ppl")
    made = {mode: prepared(mode, benchmarks, tokenizer, tmp_path / mode, "piqa@2") for mode in modes}
    assert len({one.hash for one in made.values()}) == 3
    assert [one.manifest["mode"] for one in made.values()] == list(modes)
    assert [one.tasks[0]["metric"] for one in made.values()] == ["acc_norm", "acc_per_char", "acc_ppl"]
    assert prepared(None, benchmarks, tokenizer, tmp_path / "s", str(file)).hash == made["olmes"].hash
    assert prepared("lm-eval", benchmarks, tokenizer, tmp_path / "t", str(file)).hash == made["lm-eval"].hash
    assert pack.load(tmp_path / "olmes").manifest == made["olmes"].manifest


def test_a_metric_named_for_another_mode_is_read_as_its_counterpart(benchmarks, tokenizer, tmp_path):
    named = {"piqa": "acc_norm", "arc_easy": "acc_raw", "winogrande": "acc_per_char", "truthfulqa_mc1": "acc_ppl"}
    entries = ", ".join(f"{{task: {name}, metric: {metric}}}" for name, metric in named.items())
    (tmp_path / "s.yaml").write_text(f"{{tasks: [{entries}]}}")
    made = (prepared(mode, benchmarks, tokenizer, tmp_path / "p", str(tmp_path / "s.yaml")) for mode in MODES)
    assert [[row["metric"] for row in one.tasks] for one in made] == [
        ["acc_norm", "acc", "acc_norm", "acc"],
        ["acc_per_char", "acc_raw", "acc_per_char", "acc_per_token"],
        ["acc_ppl"] * 4,
    ]


def test_bos_follows_the_policy_in_every_mode(benchmarks, tokenizer, tmp_path):
    never = prepared("olmes", benchmarks, tokenizer, tmp_path / "a", "piqa", bos="never")
    bos = open_tokenizer(tokenizer).bos_token_id
    assert all(never.context_tokens[i][0] != bos for i in range(len(never.context_tokens)))
    always = prepared("opencompass-ppl", benchmarks, tokenizer, tmp_path / "b", "piqa", bos="always")
    assert all(always.context_tokens[i].tolist() == [bos] for i in range(len(always.context_tokens)))


@pytest.mark.parametrize("mode", MODES)
def test_a_suite_may_name_the_metrics_that_are_computed_and_no_others(mode, benchmarks, tokenizer, tmp_path):
    made = prepared(mode, benchmarks, tokenizer, tmp_path / "p")
    computed = tidy.of_tasks(made, *scores(made))
    assert all(set(find_mode(mode).choice_metrics) == set(values) for values in computed.values())
    for metric in find_mode(mode).choice_metrics:
        modes.check_metric(find_mode(mode), "piqa", "multiple_choice", metric, (), False)
        assert modes.first_metric(find_mode(mode), "multiple_choice", metric) == metric
    file = tmp_path / "s.yaml"
    file.write_text("{tasks: [{task: piqa, metric: pass_at_1}]}")
    with pytest.raises(UserError, match="task 'piqa' has no metric 'pass_at_1'; name one of acc"):
        prepared(mode, benchmarks, tokenizer, tmp_path / "q", str(file))


def test_wrong_modes_are_refused_by_name(benchmarks, tokenizer, tmp_path):
    with pytest.raises(UserError, match="--mode: mode 'fast' must be one of lm-eval, olmes, opencompass-ppl"):
        prepared("fast", benchmarks, tokenizer, tmp_path / "p")
    for task in ("lambada_openai", "wikitext", "truthfulqa_mc2"):
        with pytest.raises(UserError, match=f"'{task}': mode opencompass-ppl compares the choices"):
            prepared("opencompass-ppl", benchmarks, tokenizer, tmp_path / "p", task)


CHOICE, SINGLE, WHOLE, SOLUTIONS = "multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"


@pytest.mark.parametrize(
    ("kind", "wanted", "first"),
    [
        (CHOICE, None, ("acc", "acc_per_char", "acc_ppl")),
        (CHOICE, "acc", ("acc", "acc_raw", "acc_ppl")),
        (CHOICE, "acc_norm", ("acc_norm", "acc_per_char", "acc_ppl")),
        (CHOICE, "acc_raw", ("acc", "acc_raw", "acc_ppl")),
        (CHOICE, "acc_per_char", ("acc_norm", "acc_per_char", "acc_ppl")),
        (CHOICE, "acc_per_token", ("acc_per_token", "acc_per_token", "acc_ppl")),
        (CHOICE, "acc_ppl", ("acc", "acc_per_token", "acc_ppl")),
        (CHOICE, "margin", ("margin", "margin", "margin")),
        (SINGLE, None, ("acc",) * 3),
        (SINGLE, "perplexity", ("perplexity",) * 3),
        (WHOLE, None, ("bits_per_byte",) * 3),
        (WHOLE, "word_perplexity", ("word_perplexity",) * 3),
        (SOLUTIONS, None, ("bits_per_byte",) * 3),
        (SOLUTIONS, "acc", ("bits_per_byte",) * 3),
        (SOLUTIONS, "greedy_match", ("greedy_match",) * 3),
    ],
)
def test_the_first_metric_of_every_kind_of_task_in_every_mode(kind, wanted, first):
    named = (find_mode(mode) for mode in ("lm-eval", "olmes", "opencompass-ppl"))
    assert tuple(modes.first_metric(mode, kind, wanted) for mode in named) == first


@pytest.mark.parametrize(
    ("mode", "kind", "own", "brings", "known"),
    [
        ("lm-eval", SINGLE, ["acc"], False, {"acc", "perplexity", "bits_per_byte"}),
        ("olmes", WHOLE, [], False, {"word_perplexity", "byte_perplexity", "bits_per_byte"}),
        ("lm-eval", SOLUTIONS, ["exact_match"], False, {"bits_per_byte", "bits_per_byte_best", "greedy_match"}),
        ("lm-eval", CHOICE, ["pct", "acc"], True, {"pct", "acc"}),
        ("lm-eval", CHOICE, ["f1", "mcc", "acc_mutual_info"], False,
         {*find_mode("lm-eval").choice_metrics, "f1", "mcc", "acc_mutual_info"}),
        ("olmes", CHOICE, ["f1", "acc_mutual_info"], False, set(find_mode("olmes").choice_metrics)),
    ],
)  # fmt: skip
def test_metrics_that_a_suite_may_name(mode, kind, own, brings, known):
    of_choices = [find_mode(name).choice_metrics for name in MODES]
    every = {metric for names in (*of_choices, *modes.TEXT_METRICS.values()) for metric in names}
    counterparts = (
        {"acc", "acc_norm", "acc_raw", "acc_per_char", "acc_per_token", "acc_ppl"} if kind == CHOICE else set()
    )
    for metric in every | {"f1", "mcc", "acc_mutual_info", "pct", "exact_match"}:
        if metric in known:
            modes.check_metric(find_mode(mode), "t", kind, metric, own, brings)
        elif brings or metric not in counterparts:
            with pytest.raises(UserError, match=f"no metric '{metric}'; name one of {', '.join(sorted(known))}"):
                modes.check_metric(find_mode(mode), "t", kind, metric, own, brings)


def test_what_else_a_mode_decides():
    given = {mode: [modes.largest_context(find_mode(mode), n) for n in (None, 512, 2048, 4096)] for mode in MODES}
    plain = [None, 512, 2048, 4096]
    assert given == {"lm-eval": plain, "olmes": [2048, 512, 2048, 2048], "opencompass-ppl": plain}
    weighted = {mode: find_mode(mode).groups_weighted_by_size for mode in MODES}
    assert weighted == {"lm-eval": True, "olmes": False, "opencompass-ppl": True}
    for mode in MODES:
        for kind in (CHOICE, SINGLE, WHOLE, SOLUTIONS):
            for own in (False, True):
                if mode == "opencompass-ppl" and (kind != CHOICE or own):
                    with pytest.raises(UserError, match="task 't': mode opencompass-ppl compares the choices"):
                        modes.check_task(find_mode(mode), "t", kind, own)
                else:
                    modes.check_task(find_mode(mode), "t", kind, own)


@pytest.mark.parametrize("mode", ["olmes", "opencompass-ppl"])
def test_a_trained_model_scores_as_plain_torch_code_does(mode, shared_data, tmp_path):
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    import jax
    from transformers import LlamaForCausalLM

    from fineline_jax.checkpoints import load
    from fineline_jax.checkpoints.open import open_series
    from fineline_jax.mesh import make_mesh
    from fineline_jax.recipe import MeshShape

    folder = shared_data / "models/tinystories-260k"
    options = {"limit": 3, "max_context": 1024}
    made = prepared(mode, shared_data / "benchmarks", folder, tmp_path / "p", "arc_easy", **options)
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    config, params = load.load(open_series(str(folder)).checkpoints[0], mesh)
    loglikelihood, _ = score_once(made, config, params, mesh)
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    tokenizer = open_tokenizer(folder)
    expected = []
    for context, continuation, _, _ in requests(made):
        if mode == "olmes":
            head = [tokenizer.bos_token_id, *tokenizer.encode(context, add_special_tokens=False)]
            ids = head + tokenizer.encode(continuation, add_special_tokens=False)
        else:
            head, ids = [0], tokenizer.encode(context + continuation)
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(logp[i - 1, ids[i]]) for i in range(len(head), len(ids))))
        if mode == "opencompass-ppl":
            loss = torch.nn.functional.cross_entropy(logp[:-1], torch.tensor(ids[1:]), reduction="sum")
            assert -expected[-1] / len(ids) == pytest.approx(float(loss) / len(ids), rel=1e-5)
    np.testing.assert_allclose(loglikelihood, expected, atol=2e-4, rtol=1e-6)


def test_no_file_but_those_of_the_modes_decides_by_a_modes_name():
    package = Path(fineline_jax.__file__).parent
    for path in package.rglob("*.py"):
        if package / "scoring/modes" not in path.parents:
            compared = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
            constants = {one.value for node in compared for one in ast.walk(node) if isinstance(one, ast.Constant)}
            assert not constants & {*MODES[1:]}, path  # the first is a command as well
