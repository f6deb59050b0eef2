"""Every metric against its definition, in plain loops over documents made here: unequal numbers of choices, characters
of several bytes, several right choices, ties, an empty choice, one and two documents."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lm_eval.api.metrics import bootstrap_stderr, f1_score, matthews_corrcoef, perplexity
from metric_examples import Doc, answers, docs, packed, task

from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.metrics import bootstrap, tidy
from fineline_jax.scoring.requests import pack, tasks


def each(made: pack.Pack, ll: np.ndarray, greedy: np.ndarray) -> dict[tuple[str, int], dict[str, float]]:
    """(task, document) -> metric -> value, of those it has."""
    frame = tidy.of_documents(made, ll, greedy)
    found: dict[tuple[str, int], dict[str, float]] = {}
    for name, doc, metric, value in zip(frame["task"], frame["doc"], frame["metric"], frame["value"], strict=True):
        found.setdefault((name, doc), {})[metric] = value
    return found


def requests_of(made: pack.Pack) -> list[tuple[str, int, range]]:
    rows = made.documents.select(["task", "doc", "first_request", "requests"]).to_pylist()
    return [(r["task"], r["doc"], range(r["first_request"], r["first_request"] + r["requests"])) for r in rows]


# The definitions


def wins(values: list[float], gold: tuple[int, ...]) -> float:
    """The first of the largest, as numpy's and lm-eval's arg-max."""
    return float(values.index(max(values)) in gold)


def per(values: list[float], lengths: Any) -> list[float]:
    return [value / n if n else -math.inf for value, n in zip(values, lengths, strict=True)]


def share(values: list[float], gold: tuple[int, ...]) -> float:
    weights = [math.exp(value - max(values)) for value in values]
    return sum(weights[i] for i in gold) / sum(weights)


def smooth(doc: Doc, ll: list[float]) -> dict[str, float]:
    best = max(doc.gold, key=lambda i: (ll[i], -i))
    wrong = [value for i, value in enumerate(ll) if i not in doc.gold]
    size = len(doc.choices[best].encode())
    return {
        "choice_prob": share(ll, doc.gold),
        "choice_prob_per_token": share(per(ll, doc.tokens), doc.gold),
        "choice_prob_per_char": share(per(ll, map(len, doc.choices)), doc.gold),
        **({"margin": ll[best] - max(wrong)} if wrong else {}),
        **({"bits_per_byte": -ll[best] / (size * math.log(2))} if size else {}),
    }


def of_lm_eval(doc: Doc, ll: list[float], greedy: list[bool], alone: list[float] | None) -> dict[str, float]:
    inside = tuple(i for i in doc.gold if i >= 0)
    found = {
        "acc": wins(ll, inside),
        "acc_norm": wins(per(ll, map(len, doc.choices)), inside),
        "acc_bytes": wins(per(ll, (len(c.encode()) for c in doc.choices)), inside),
        "exact_match": float(any(greedy[i] for i in inside)),
    }
    if alone is not None:
        found["acc_mutual_info"] = wins([a - b for a, b in zip(ll, alone, strict=True)], inside)
    if inside:
        shares = [share(ll, (i,)) for i in range(len(ll))]
        found["brier_score"] = sum((p - (i in inside)) ** 2 for i, p in enumerate(shares))
        found |= smooth(dataclasses.replace(doc, gold=inside), ll)
    return found


def of_olmes(doc: Doc, ll: list[float], greedy: list[bool], alone: list[float] | None) -> dict[str, float]:
    found = {
        "acc_raw": wins(ll, doc.gold),
        "acc_per_token": wins(per(ll, doc.tokens), doc.gold),
        "acc_per_char": wins(per(ll, map(len, doc.choices)), doc.gold),
    }
    if alone is not None:
        found["acc_uncond"] = wins([a - b for a, b in zip(ll, alone, strict=True)], doc.gold)
    return found | smooth(doc, ll)


def of_opencompass(doc: Doc, ll: list[float], greedy: list[bool], alone: list[float] | None) -> dict[str, float]:
    mean = per(ll, (n + 1 for n in doc.tokens))
    return {"acc_ppl": wins(mean, doc.gold), "cross_entropy": -max(mean[i] for i in doc.gold)}


@pytest.mark.parametrize("unconditional", [False, True])
@pytest.mark.parametrize("most_gold", [1, 3])
@pytest.mark.parametrize(
    ("mode", "definition"), [("lm-eval", of_lm_eval), ("olmes", of_olmes), ("opencompass-ppl", of_opencompass)]
)
def test_metrics_of_choices_are_their_definitions(mode, definition, most_gold, unconditional):
    asked = {"first": docs(7, 5, most_gold), "second": docs(61, 6, most_gold), "third": docs(2, 7, most_gold)}
    made = packed([(task(name, unconditional=unconditional), some) for name, some in asked.items()], mode)
    ll, greedy = answers(made)
    found = each(made, ll, greedy)
    expected: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
    for name, number, places in requests_of(made):
        doc, k = asked[name][number], len(asked[name][number].choices)
        alone = ll[places[k:]].tolist() if unconditional else None
        one = definition(doc, ll[places[:k]].tolist(), greedy[places[:k]].tolist(), alone)
        assert found[name, number] == pytest.approx(one, rel=1e-13), (name, number)
        expected[name].append(one)
    values = tidy.of_tasks(made, ll, greedy)
    for name, rows in expected.items():
        assert set(values[name]) == set().union(*rows)
        for metric, value in values[name].items():
            column = [row[metric] for row in rows if metric in row]
            assert value.n == len(column) and value.value == pytest.approx(np.mean(column), rel=1e-13)
            assert value.stderr == pytest.approx(np.std(column, ddof=1) / math.sqrt(len(column)), rel=1e-12)
    # otherwise the sizes and ties above tell nothing apart
    [large] = [rows for name, rows in expected.items() if name == "second"]
    kinds = [key for key in large[0] if key.startswith("acc")]
    assert all([row[a] for row in large] != [row[b] for row in large] for a in kinds for b in kinds if a < b)


def test_an_empty_choice_loses_and_has_no_bits():
    doc = Doc(("", "ab"), (0,), (1, 1))
    made = packed([(task("t"), [doc])])
    found = each(made, np.array([-1.0, -2.0]), np.array([True, False]))["t", 0]
    assert found == pytest.approx(of_lm_eval(doc, [-1.0, -2.0], [True, False], None), rel=1e-13)
    assert (found["acc"], found["acc_norm"], found["acc_bytes"], found["exact_match"]) == (1, 0, 0, 1)
    assert "bits_per_byte" not in found and found["choice_prob_per_char"] == 0
    values = tidy.of_tasks(made, np.array([-1.0, -2.0]), np.array([True, False]))["t"]
    assert values["bits_per_byte"].n == 0 and math.isnan(values["bits_per_byte"].value)


def test_a_document_without_a_right_choice_is_answered_wrongly_and_has_nothing_smooth():
    """lm-eval's label is -100 where the answer is none of the choices."""
    known, unknown = Doc(("a", "bc"), (1,), (1, 2)), Doc(("a", "bc"), (-100,), (1, 2))
    made = packed([(task("t"), [unknown, known])])
    ll, greedy = np.array([-2.0, -1.0, -2.0, -1.0]), np.array([True, True, False, True])
    found = each(made, ll, greedy)
    assert found["t", 0] == {"acc": 0, "acc_norm": 0, "acc_bytes": 0, "exact_match": 0}
    values = tidy.of_tasks(made, ll, greedy)["t"]
    assert (values["acc"].value, values["acc"].n, values["exact_match"].value) == (0.5, 2, 0.5)
    assert values["margin"].n == values["brier_score"].n == values["choice_prob"].n == 1


def test_where_all_choices_are_right_there_is_no_margin():
    found = each(packed([(task("t"), [Doc(("a", "b"), (0, 1), (1, 1))])]), np.array([-1.0, -2.0]), np.zeros(2, bool))
    assert "margin" not in found["t", 0] and found["t", 0]["choice_prob"] == pytest.approx(1)
    assert found["t", 0]["bits_per_byte"] == pytest.approx(1 / math.log(2))


def test_gold_solutions_are_scored_by_the_first_and_by_the_best():
    asked = docs(20, choices=(1, 2, 3))
    made = packed([(task("before"), docs(3)), (task("g", "generate_until", chance=None), asked)])
    ll, greedy = answers(made)
    found = each(made, ll, greedy)
    for name, number, places in requests_of(made):
        if name == "g":
            sizes = [len(text.encode()) * math.log(2) for text in asked[number].choices]
            bits = [-value / size for value, size in zip(ll[places], sizes, strict=True)]
            one = {
                "bits_per_byte": bits[0],
                "bits_per_byte_best": min(bits),
                "greedy_match": float(any(greedy[places])),
            }
            assert found[name, number] == pytest.approx(one, rel=1e-13)


def test_single_continuations(monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    asked = docs(5, choices=(1,))
    made = packed([(task("before"), docs(4)), (task("l", "loglikelihood"), asked)])
    ll, greedy = answers(made)
    places = [rows[0] for name, _, rows in requests_of(made) if name == "l"]
    values = tidy.of_tasks(made, ll, greedy)["l"]
    bits = [-ll[i] / (len(doc.choices[0].encode()) * math.log(2)) for i, doc in zip(places, asked, strict=True)]
    assert values["acc"].value == np.mean(greedy[places])
    assert values["bits_per_byte"].value == pytest.approx(np.mean(bits), rel=1e-13)
    assert values["perplexity"].value == pytest.approx(math.exp(-np.mean(ll[places])), rel=1e-13)
    assert values["perplexity"].stderr == pytest.approx(bootstrap_stderr(perplexity, list(ll[places]), 100_000), 1e-10)
    assert math.isnan(tidy.of_tasks(made, ll, greedy, resample=False)["l"]["perplexity"].stderr)


def ratio(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """sum / sum with the standard error of the delta method: the gradient at the means, through their covariance."""
    x, w = values.mean(), weights.mean()
    gradient = np.array([1 / w, -x / w**2])
    return x / w, math.sqrt(gradient @ np.cov(values, weights, ddof=1) @ gradient / len(values))


@pytest.mark.parametrize("count", [2, 3, 40])
def test_whole_texts_are_ratios_of_sums_with_the_error_of_the_delta_method(count):
    asked = docs(count, choices=(1,))
    made = packed([(task("before"), docs(3)), (task("r", "loglikelihood_rolling"), asked)])
    ll, greedy = answers(made)
    ll = ll * 20
    scored = ll[[rows[0] for name, _, rows in requests_of(made) if name == "r"]]
    values = tidy.of_tasks(made, ll, greedy)["r"]
    assert set(values) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    per_word, word_error = ratio(scored, np.array([float(doc.words) for doc in asked]))
    per_byte, byte_error = ratio(scored, np.array([float(doc.bytes) for doc in asked]))
    for metric, value, stderr in (
        ("word_perplexity", math.exp(-per_word), math.exp(-per_word) * word_error),
        ("byte_perplexity", math.exp(-per_byte), math.exp(-per_byte) * byte_error),
        ("bits_per_byte", -per_byte / math.log(2), byte_error / math.log(2)),
    ):
        assert values[metric] == tidy.Value(pytest.approx(value, 1e-12), pytest.approx(stderr, 1e-9), count), metric
    found = each(made, ll, greedy)
    assert [found["r", i]["bits_per_byte"] for i in range(count)] == pytest.approx(
        [-value / doc.bytes / math.log(2) for value, doc in zip(scored, asked, strict=True)], rel=1e-13
    )


def test_texts_of_which_only_words_or_bytes_count_have_that_perplexity_alone():
    counted = {"words": [Doc(("a",), (0,), (1,), words=3)], "bytes": [Doc(("a",), (0,), (1,), bytes=3)]}
    made = packed([(task(name, "loglikelihood_rolling"), some) for name, some in counted.items()])
    values = tidy.of_tasks(made, np.array([-3.0, -6.0]), np.zeros(2, bool))
    assert {name: set(found) for name, found in values.items()} == {
        "words": {"word_perplexity"}, "bytes": {"byte_perplexity", "bits_per_byte"},
    }  # fmt: skip
    assert values["bytes"]["byte_perplexity"].value == pytest.approx(math.exp(2))
    assert ("words", 0) not in each(made, np.array([-3.0, -6.0]), np.zeros(2, bool))


@pytest.mark.parametrize("kind", ["multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_one_document_has_values_and_no_standard_errors_two_have_both(kind):
    for count in (1, 2):
        made = packed([(task("t", kind), docs(count, choices=(1,) if kind.startswith("log") else (3,)))])
        values = tidy.of_tasks(made, *answers(made))["t"]
        assert values and {value.n for value in values.values()} == {count}
        assert all(math.isfinite(value.value) for value in values.values())
        assert {math.isnan(value.stderr) for value in values.values()} == {count == 1}


def test_a_perplexity_beyond_the_largest_number_is_infinite():
    asked = [Doc(("a",), (0,), (1,), 1, 1)] * 3
    made = packed([(task("l", "loglikelihood"), asked), (task("r", "loglikelihood_rolling"), asked)])
    for each_ll, finite in ((-708.0, True), (-710.0, False)):
        values = tidy.of_tasks(made, np.full(6, each_ll), np.zeros(6, bool), resample=False)
        assert math.isfinite(values["l"]["perplexity"].value) == finite
        assert math.isfinite(values["r"]["word_perplexity"].value) == finite


def test_scores_of_another_number_of_requests_are_refused():
    made = packed([(task("t"), docs(2))])
    with pytest.raises(UserError, match=r"\d+ scores for a pack of \d+ requests"):
        tidy.of_tasks(made, np.zeros(made.requests.num_rows + 1), np.zeros(made.requests.num_rows + 1, bool))


# Groups


def group(name: str, leaves: list[str], **more: Any) -> dict[str, Any]:
    row = {"group": name, "domain": "g", "metric": "acc", "chance": 0.3, "tasks": leaves, "weight_by_size": {}}
    return row | {"weight_others_by_size": True} | more


def test_a_weighted_group_is_the_mean_over_documents_with_their_pooled_deviation():
    asked = {"a": docs(4, 1), "b": docs(30, 2), "c": docs(11, 3)}
    plain = group("plain", ["a", "b", "c"], weight_by_size={"acc": False})
    made = packed([(task(name), some) for name, some in asked.items()], groups=(group("g", ["a", "b"]), plain))
    ll, greedy = answers(made)
    values = tidy.of_tasks(made, ll, greedy)
    assert list(values) == ["a", "b", "c", "g", "plain"]
    columns = {
        name: np.array([row["acc"] for (n, _), row in each(made, ll, greedy).items() if n == name]) for name in asked
    }
    both = np.concatenate([columns["a"], columns["b"]])
    # sum of squares about each task's own mean, over the degrees of freedom; then of a mean of n
    inside = sum(((x - x.mean()) ** 2).sum() for x in (columns["a"], columns["b"]))
    assert values["g"]["acc"] == tidy.Value(
        pytest.approx(both.mean(), rel=1e-13), pytest.approx(math.sqrt(inside / (34 - 2) / 34), rel=1e-13), 34
    )
    means = [x.mean() for x in columns.values()]
    variances = [x.var(ddof=1) / len(x) for x in columns.values()]
    assert values["plain"]["acc"] == tidy.Value(
        pytest.approx(np.mean(means), rel=1e-13), pytest.approx(math.sqrt(sum(variances)) / 3, rel=1e-13), 45
    )
    assert values["plain"]["acc_norm"].value != pytest.approx(np.mean([values[n]["acc_norm"].value for n in asked]))


def test_a_group_of_single_documents_has_a_value_and_no_error():
    made = packed([(task("a"), docs(1, 1)), (task("b"), docs(1, 2))], groups=(group("g", ["a", "b"]),))
    values = tidy.of_tasks(made, *answers(made))
    assert values["g"]["acc"].value == (values["a"]["acc"].value + values["b"]["acc"].value) / 2
    assert values["g"]["acc"].n == 2 and math.isnan(values["g"]["acc"].stderr)


def test_perplexities_are_averaged_over_a_group_only_where_it_says_so():
    asked = [(task(name, "loglikelihood"), docs(count, choices=(1,))) for name, count in (("a", 2), ("b", 6))]
    made = packed(
        asked, groups=(group("no", ["a", "b"]), group("yes", ["a", "b"], weight_by_size={"perplexity": True}))
    )
    values = tidy.of_tasks(made, *answers(made), resample=False)
    assert "perplexity" not in values["no"] and "acc" in values["no"]
    parts = [values[name]["perplexity"].value for name in ("a", "b")]
    assert values["yes"]["perplexity"].value == pytest.approx((2 * parts[0] + 6 * parts[1]) / 8)


def test_documents_without_a_value_do_not_count_in_a_group():
    unknown = [Doc(("a", "b"), (-100,), (1, 1))] * 3
    made = packed([(task("a"), unknown), (task("b"), docs(5))], groups=(group("g", ["a", "b"]), group("n", ["a"])))
    values = tidy.of_tasks(made, *answers(made))
    assert values["g"]["margin"].value == values["b"]["margin"].value and values["g"]["margin"].n == 5
    assert values["g"]["acc"].n == 8 and "margin" not in values["n"]


# Tasks with code of their own


HELPERS = """
import numpy
from sklearn.metrics import f1_score

def macro(items):
    right, chosen = zip(*items)
    return f1_score(right, chosen, average="weighted", zero_division=0)

def largest(items):
    return max(items)

def results(doc, results):
    found = {
        "plain": doc["number"] * results[0][0], "acc_all": (results[0][1], doc), "ppl": results[-1][0],
        "largest": results[0][0], "unlisted": float(results[0][1]),
        "compared": numpy.less(results[0][0], results[-1][0]),
    }
    return found if doc["number"] % 2 else found | {"sometimes": 1.0}
"""
OWN = """
task: own
output_type: multiple_choice
process_results: !function helpers.results
metric_list:
  - metric: plain
  - {metric: acc_all, aggregation: !function helpers.all_parts}
  - {metric: ppl, aggregation: perplexity}
  - {metric: largest, aggregation: !function helpers.largest}
"""
CHOICES = "task: {}\noutput_type: multiple_choice\nmetric_list:\n"
DEFINITIONS = {
    "own.yaml": OWN.replace("!function helpers.all_parts", "!function helpers.acc_all"),
    "helpers.py": "from lm_eval.api.metrics import acc_all\n" + HELPERS,
    "two.yaml": CHOICES.format("two") + "  - metric: acc\n  - metric: f1\n  - metric: mcc\n",
    "macro.yaml": CHOICES.format("macro") + "  - {metric: f1, aggregation: !function helpers.macro}\n",
}


@pytest.fixture
def definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in DEFINITIONS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(tasks, "TASKS_FOLDER", tmp_path)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def pairs_of(made: pack.Pack, ll: np.ndarray, asked: list[Doc]) -> list[tuple[int, int]]:
    """(right choice, chosen one)"""
    places = [rows for _, _, rows in requests_of(made)]
    return [(doc.gold[0], int(np.argmax(ll[rows]))) for doc, rows in zip(asked, places, strict=True)]


@pytest.mark.parametrize("count", [1, 2, 3, 24])
def test_a_kind_of_f1_of_the_task_itself_has_the_jackknifes_error(count, definitions):
    from sklearn.metrics import f1_score as f1

    asked = docs(count, choices=(3,))
    made = packed([(task("macro", lm_eval_metrics=["acc", "f1"]), asked)])
    ll, greedy = answers(made)
    pairs = np.array(pairs_of(made, ll, asked))
    macro = lambda rows: f1(rows[:, 0], rows[:, 1], average="weighted", zero_division=0)
    value = tidy.of_tasks(made, ll, greedy)["macro"]["f1"]
    assert value.value == pytest.approx(macro(pairs), rel=1e-13) and value.n == count
    if count < 3:
        assert math.isnan(value.stderr)
        return
    without = np.array([macro(np.delete(pairs, i, axis=0)) for i in range(count)])
    assert value.stderr == pytest.approx(
        math.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()), 1e-12
    )


def test_the_jackknife_of_a_mean_is_its_standard_error(monkeypatch):
    from fineline_jax.scoring.metrics import process_results

    monkeypatch.setattr(process_results, "_config", lambda name: {})  # what is not listed is averaged
    monkeypatch.setattr(
        process_results, "aggregation_of", lambda *_: lambda pairs: float(np.mean([a == b for a, b in pairs]))
    )
    pairs = [(0, 0)] * 7 + [(0, 1)] * 3 + [(1, 1)] * 2 + [(1, 0)]
    found = process_results.of_predictions({"task": "t", "config_sha256": "0"}, "f1", pairs)
    hits = np.array([a == b for a, b in pairs], float)
    assert found.stderr == pytest.approx(hits.std(ddof=1) / math.sqrt(len(hits)), rel=1e-12)


def test_f1_and_correlation_are_lm_evals_and_so_are_their_errors(definitions):
    asked = [Doc(doc.choices, doc.gold if i else (-100,), doc.tokens) for i, doc in enumerate(docs(12, choices=(2,)))]
    two = asked[1:]
    made = packed([(task("two", lm_eval_metrics=["acc", "f1", "mcc"]), two)])
    ll, greedy = answers(made)
    pairs = pairs_of(made, ll, two)
    values = tidy.of_tasks(made, ll, greedy)["two"]
    assert values["f1"].value == pytest.approx(f1_score(pairs), rel=1e-13)
    assert values["mcc"].value == pytest.approx(matthews_corrcoef(pairs), rel=1e-13)
    array = np.array([pairs])
    assert values["f1"].stderr == bootstrap.of_f1(array)[0] and values["mcc"].stderr == bootstrap.of_mcc(array)[0]
    unknown = packed([(task("two", lm_eval_metrics=["mcc"]), asked)])
    ll, greedy = answers(unknown)
    found = tidy.of_tasks(unknown, ll, greedy, resample=False)["two"]
    assert found["mcc"].value == pytest.approx(matthews_corrcoef(pairs_of(unknown, ll, asked)), rel=1e-13)
    assert "f1" not in found


def test_f1_of_the_first_of_several_right_choices_and_not_in_other_modes(definitions):
    asked = docs(20, most_gold=2, choices=(3,))
    row = task("macro", lm_eval_metrics=["acc", "f1"])
    made = packed([(row, asked)])
    ll, greedy = answers(made)
    right, chosen = zip(*pairs_of(made, ll, asked), strict=True)
    from sklearn.metrics import f1_score as f1

    expected = f1(right, chosen, average="weighted", zero_division=0)
    assert tidy.of_tasks(made, ll, greedy)["macro"]["f1"].value == pytest.approx(expected, rel=1e-13)
    assert "f1" not in tidy.of_tasks(packed([(row, asked)], "olmes"), ll, greedy)["macro"]


def test_a_task_with_its_own_code_is_aggregated_as_it_says(definitions):
    asked = [
        dataclasses.replace(
            doc, content={"number": i, "idx": {"paragraph": i // 4, "question": i // 2}, "label": i % 2}
        )
        for i, doc in enumerate(docs(10, choices=(2,)))
    ]
    made = packed([(task("before"), docs(3)), (task("own", own_metrics=True), asked)])
    ll, greedy = answers(made)
    rows = [places for name, _, places in requests_of(made) if name == "own"]
    first, last = np.array([ll[r[0]] for r in rows]), np.array([ll[r[-1]] for r in rows])
    guessed = greedy[[r[0] for r in rows]]
    values = tidy.of_tasks(made, ll, greedy)["own"]
    plain = np.arange(10) * first

    def mean_of(column: np.ndarray) -> tidy.Value:
        error = column.std(ddof=1) / math.sqrt(len(column))
        return tidy.Value(pytest.approx(column.mean(), rel=1e-12), pytest.approx(error, rel=1e-12), len(column))

    assert values["plain"] == mean_of(plain) and values["unlisted"] == mean_of(guessed.astype(float))
    assert values["sometimes"] == tidy.Value(1.0, 0.0, 5)
    assert values["largest"].value == first.max() and math.isnan(values["largest"].stderr)
    assert values["ppl"].value == pytest.approx(math.exp(-last.mean()), rel=1e-13)
    assert values["ppl"].stderr == pytest.approx(bootstrap_stderr(perplexity, list(last), 100_000), 1e-10)
    both = np.array([all(guessed[i] == bool(i % 2) for i in (q, q + 1)) for q in range(0, 10, 2)], float)
    assert values["acc_all"] == dataclasses.replace(mean_of(both), n=10)
    one = [dataclasses.replace(doc, content=doc.content | {"idx": {"paragraph": 0, "question": 0}}) for doc in asked]
    alone = packed([(task("own", own_metrics=True), one)])
    assert math.isnan(tidy.of_tasks(alone, *answers(alone))["own"]["acc_all"].stderr)  # of a single question
    found = each(made, ll, greedy)
    assert [found["own", i].get("plain") for i in range(10)] == pytest.approx(plain.tolist())
    assert "acc_all" not in found["own", 0] and found["own", 1]["ppl"] == last[1]
    assert [found["own", i]["compared"] for i in range(10)] == (first < last).tolist()
    single = packed([(task("own", own_metrics=True), asked[:1])])
    assert math.isnan(tidy.of_tasks(single, *answers(single))["own"]["ppl"].stderr)
    continued = packed([(task("own", "loglikelihood", own_metrics=True), asked)])
    assert set(tidy.of_tasks(continued, *answers(continued))["own"]) == set(values), "only what its code gives"


# The table of a folder


def test_the_chance_of_a_task_is_that_of_its_accuracies_and_probabilities_and_of_the_metric_its_suite_names(
    definitions, tmp_path
):
    asked = docs(6, choices=(2,))
    entries = [
        task("a", metric="margin", chance=0.125, unconditional=True),
        task("b", metric="acc_norm", chance=0.5),
        task("l", "loglikelihood", chance=0.0),
        task("g", "generate_until", metric="bits_per_byte", chance=None),
        task("own", metric="plain", chance=0.5, own_metrics=True),
    ]
    group_row = group("both", ["a", "b"], metric="bits_per_byte", chance=0.75)
    numbered = [
        dataclasses.replace(doc, content={"number": i, "idx": {"paragraph": 0, "question": i}, "label": 0})
        for i, doc in enumerate(asked)
    ]
    made = packed([(row, numbered) for row in entries], groups=(group_row,))
    table = tidied(tmp_path / "s", made, [("c", 1, 100)])
    guessable = {
        "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "choice_prob", "choice_prob_per_token",
        "choice_prob_per_char",
    }  # fmt: skip
    levels = {"a": 0.125, "b": 0.5, "l": 0.0, "own": 0.5, "both": 0.75}
    first = {"a": "margin", "b": "acc_norm", "l": "acc", "own": "plain", "both": "bits_per_byte"}
    for row in table.itertuples():
        known = row.task in levels and row.metric in {first[row.task]} | (guessable if row.task != "own" else set())
        assert row.chance == pytest.approx(levels[row.task] if known else math.nan, nan_ok=True), (row.task, row.metric)
    assert dict(zip(table["task"], table["domain"], strict=True))["both"] == "g"
    stored = pack.load(tmp_path / "s" / "pack").manifest
    reported = {row["task"]: row["metric"] for row in stored["tasks"]}
    reported |= {row["group"]: row["metric"] for row in stored["groups"]}
    assert reported == first | {"g": "bits_per_byte"}


@pytest.mark.parametrize(
    ("mode", "guessable", "others"),
    [
        (
            "olmes",
            {"acc_raw", "acc_per_token", "acc_per_char", "acc_uncond", "choice_prob", "choice_prob_per_token",
             "choice_prob_per_char"},
            {"margin", "bits_per_byte"},
        ),
        ("opencompass-ppl", {"acc_ppl"}, {"cross_entropy"}),
    ],
)  # fmt: skip
def test_the_chance_of_the_metrics_of_other_modes(mode, guessable, others, tmp_path):
    row = task("t", metric="none of them", unconditional=True)
    table = tidied(tmp_path / "s", packed([(row, docs(5))], mode), [("c", 1, 100)])
    assert set(table["metric"][table["chance"] == 0.25]) == guessable
    assert set(table["metric"][table["chance"].isna()]) == others


def tidied(folder: Path, made: pack.Pack, checkpoints: list[tuple[str, int | None, int | None]]) -> pd.DataFrame:
    score_files.keep_pack(folder, made)
    for number, (name, step, tokens) in enumerate(checkpoints):
        header = score_files.Header(
            "run", name, step, tokens, 64, score_files.Key("w", made.hash, "float32", "auto", "test")
        )
        score_files.write(folder, score_files.Scores(header, *answers(made, number)))
    return tidy.tidy(folder)


def test_the_table_orders_checkpoints_by_tokens_and_gives_each_its_own_values(tmp_path):
    made = packed([(task("l", "loglikelihood"), docs(6, choices=(1,))), (task("b"), docs(5))])
    checkpoints = [("a", 30, 900), ("b", 9, None), ("c", 4, 80), ("d", None, None)]
    table = tidied(tmp_path, made, checkpoints)
    assert list(dict.fromkeys(table["checkpoint"])) == ["c", "a", "b", "d"]
    assert list(dict.fromkeys(table["task"])) == ["l", "b"]
    assert table["step"].dtype == table["tokens"].dtype == "Int64" and table["tokens"].isna().any()
    for number, (name, _, _) in enumerate(checkpoints):
        expected = tidy.of_tasks(made, *answers(made, number))
        for row in table[table["checkpoint"] == name].itertuples():
            value = expected[row.task][row.metric]
            assert (row.value, row.n) == (value.value, value.n)
            assert row.stderr == pytest.approx(value.stderr, nan_ok=True, rel=1e-12), (name, row.task, row.metric)


def test_a_metric_without_a_value_has_no_row(tmp_path):
    made = packed([(task("t"), [Doc(("a", "b"), (-100,), (1, 1))] * 2)])
    assert set(tidied(tmp_path, made, [("c", 1, 1)])["metric"]) == {"acc", "acc_norm", "acc_bytes", "exact_match"}


def test_series_stand_one_after_the_other_and_equal_tokens_by_steps(tmp_path):
    made = packed([(task("t"), docs(3))])
    score_files.keep_pack(tmp_path, made)
    for series, name, step, tokens in (("b", "x", 1, 5), ("a", "z", 9, 50), ("a", "u", 9, 7), ("a", "v", 3, 7)):
        header = score_files.Header(
            series, name, step, tokens, 64, score_files.Key("w", made.hash, "float32", "auto", "test")
        )
        score_files.write(tmp_path, score_files.Scores(header, *answers(made)))
    assert list(dict.fromkeys(tidy.tidy(tmp_path)["checkpoint"])) == ["v", "u", "z", "x"]
