"""The bootstrap over documents, against resamples taken one by one, and against standard errors."""

import numpy as np
import pytest
from metric_examples import docs, packed, task

from fineline_jax.scoring import score_files
from fineline_jax.scoring.metrics import resampled, tidy

SIZES = {"one": 60, "two": 90, "word": 50, "text": 40}
GROUP = {"group": "g", "tasks": ["one", "two"], "weight_by_size": {"acc": False}, "weight_others_by_size": True}


@pytest.fixture(scope="module")
def made():
    return packed(
        [
            (task("one"), docs(60, 1)),
            (task("two"), docs(90, 2)),
            (task("word", "loglikelihood"), docs(50, 3, choices=(1,))),
            (task("text", "loglikelihood_rolling"), docs(40, 4, choices=(1,))),
        ],
        groups=(GROUP,),
    )


def scores(pack, name: str, seed: int, series: str = "run") -> score_files.Scores:
    rng = np.random.default_rng(seed)
    key = score_files.Key("w", pack.hash, "float32", "auto", "test")
    header = score_files.Header(series, name, 1, 1000, 64, key)
    likelihoods = -rng.exponential(20.0, pack.requests.num_rows)
    return score_files.Scores(header, likelihoods, rng.random(pack.requests.num_rows) < 0.4)


def by_key(frame) -> dict[tuple[str, str, str, str], np.ndarray]:
    return {tuple(row[:4]): row[4] for row in frame.itertuples(index=False)}


def test_a_draw_is_the_metric_of_the_documents_drawn(made) -> None:
    one = scores(made, "c0", 0)
    found = by_key(resampled.deviations(made, [one], draws=7))
    values = tidy.of_documents(made, one.loglikelihood, one.is_greedy)
    whole = tidy.of_tasks(made, one.loglikelihood, one.is_greedy, resample=False)
    checked = 0
    for (name, metric), part in values.groupby(["task", "metric"]):
        if name == "text":
            continue
        column = part.set_index("doc")["value"]
        counts = resampled.drawn_documents(name, SIZES[name], 7)
        for draw, taken in enumerate(counts.astype(int)):
            drawn = np.repeat(column.to_numpy(), taken[column.index])
            expected = drawn.mean() - whole[name][metric].value
            assert found["run", "c0", name, metric][draw] == pytest.approx(expected, abs=1e-6), (name, metric)
        checked += 1
    assert checked >= 12


def test_perplexities_are_of_the_summed_likelihoods(made) -> None:
    one = scores(made, "c0", 0)
    found = by_key(resampled.deviations(made, [one], draws=5))
    whole = tidy.of_tasks(made, one.loglikelihood, one.is_greedy, resample=False)
    rows = [row for row in made.documents.to_pylist() if row["task"] == "text"]
    likelihood = np.array([one.loglikelihood[row["first_request"]] for row in rows])
    for metric, size in (("word_perplexity", "words"), ("byte_perplexity", "bytes"), ("bits_per_byte", "bytes")):
        sizes = np.array([row[size] for row in rows])
        for draw, taken in enumerate(resampled.drawn_documents("text", 40, 5)):
            rate = -(taken @ likelihood) / (taken @ sizes)
            expected = (rate / np.log(2) if metric == "bits_per_byte" else np.exp(rate)) - whole["text"][metric].value
            assert found["run", "c0", "text", metric][draw] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert ("run", "c0", "word", "perplexity") in found


def test_their_spread_is_the_standard_error(made) -> None:
    one = scores(made, "c0", 3)
    whole = tidy.of_tasks(made, one.loglikelihood, one.is_greedy, resample=False)
    for (_, _, name, metric), drawn in by_key(resampled.deviations(made, [one], draws=4000)).items():
        stderr = whole[name][metric].stderr
        if np.isfinite(stderr) and stderr > 0:
            # a resample's variance is (n - 1) / n of that of a sample; 4,000 draws know it to 1.1 %; perplexities are
            # skewed; the group pools the variances of its tasks, which are not the same
            assert drawn.std() == pytest.approx(stderr, rel=0.12), (name, metric)


def test_checkpoints_and_runs_are_asked_the_same_documents(made) -> None:
    both = [scores(made, "c0", 0), scores(made, "c1", 0), scores(made, "c0", 1, series="other")]
    found = by_key(resampled.deviations(made, both, draws=300))
    for name in ("one", "two", "word"):
        assert found["run", "c0", name, "acc"] == pytest.approx(found["run", "c1", name, "acc"])
    alone = by_key(resampled.deviations(made, both[2:], draws=300))
    assert found["other", "c0", "one", "acc"] == pytest.approx(alone["other", "c0", "one", "acc"])


def test_a_group_weighs_its_tasks_as_its_value_does(made) -> None:
    found = by_key(resampled.deviations(made, [scores(made, "c0", 0)], draws=3))
    get = lambda name, metric: found["run", "c0", name, metric]
    assert get("g", "acc") == pytest.approx((get("one", "acc") + get("two", "acc")) / 2, abs=1e-7)
    assert get("g", "margin") == pytest.approx((60 * get("one", "margin") + 90 * get("two", "margin")) / 150, abs=1e-6)
