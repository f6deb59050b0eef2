"""Task dynamic prediction: the verdict against all exchanges of labels, its rates on nulls, and published curves."""

import itertools

import numpy as np
import pandas as pd
import pytest

from fineline_jax.trajectories.statistics import prediction
from fineline_jax.trajectories.statistics.prediction import exchange_test, exchanges, holdout_errors, verdicts


def curves(
    rng: np.random.Generator, checkpoints: int, *, domain: float = 0.0, common: float = 0.0, tasks: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """(values [T, tasks], labels): noisy random walks with one drift; shares of variance by domain and by all."""
    labels = np.arange(tasks) % 2
    own = rng.standard_normal((checkpoints, tasks)) * np.sqrt(1 - domain - common)
    shared = rng.standard_normal((checkpoints, 2))[:, labels] * np.sqrt(domain)
    steps = own + shared + rng.standard_normal((checkpoints, 1)) * np.sqrt(common)
    drift = np.linspace(1, 0.2, checkpoints)[:, None] * 0.25
    walk = np.cumsum(drift + 0.5 * steps, axis=0)
    return walk + 0.3 * rng.standard_normal(walk.shape), labels.astype(str)


def table_of(values: np.ndarray, labels, series: str = "run", tokens=None) -> pd.DataFrame:
    tokens = np.arange(1.0, len(values) + 1) if tokens is None else tokens
    parts = [
        {"series": series, "metric": "acc", "task": f"task {k}", "domain": str(label), "tokens": tokens,
         "value": values[:, k]}
        for k, label in enumerate(labels)
    ]  # fmt: skip
    return pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True)


@pytest.mark.parametrize(
    ("sizes", "smallest"),
    [
        ((4, 4), 1 / 35),
        ((3, 3), 1 / 10),
        ((4, 5), 1 / 126),
        ((1, 2, 3), 1 / 60),
        ((2, 2, 2), 1 / 15),
        ((1, 1, 3), 1 / 10),
    ],
)
def test_the_p_is_that_of_all_permutations_of_the_labels(sizes, smallest):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.random.default_rng(3).permutation(labels)
    correlations = np.corrcoef(np.random.default_rng(5).standard_normal((len(labels), 12)))
    upper = np.triu_indices(len(labels), 1)

    def gap(given) -> float:
        given = np.asarray(given)
        same = given[upper[0]] == given[upper[1]]
        return correlations[upper][same].mean() - correlations[upper][~same].mean()

    every = [gap(p) for p in set(itertools.permutations(labels.tolist()))]
    measured, p, least = exchange_test(correlations, labels.astype(str))
    assert measured == pytest.approx(gap(labels))
    assert p == pytest.approx(np.mean(np.array(every) >= measured - 1e-12))
    assert least == pytest.approx(smallest)


def test_where_there_are_too_many_divisions_random_ones_stand_for_them():
    labels = np.repeat(["a", "b"], [8, 9])
    drawn, smallest = exchanges(labels, draws=2000)
    assert smallest == pytest.approx(1 / 24310)
    assert drawn.shape == (2001, 17)
    assert (np.sort(drawn, axis=1) == np.sort(drawn[:1], axis=1)).all()
    assert (drawn[0] == np.repeat([0, 1], [8, 9])).all()
    # Each label is as often at each task as its share.
    assert drawn[1:].mean(axis=0) == pytest.approx(np.full(17, 9 / 17), abs=0.05)
    again, _ = exchanges(labels, draws=2000)
    assert (drawn == again).all()


@pytest.mark.parametrize(
    ("checkpoints", "planted", "low", "high"),
    [(27, {}, 0, 0.06), (150, {}, 0, 0.06), (27, {"common": 0.5}, 0, 0.06), (27, {"domain": 0.5}, 0.75, 1)],
    ids=["walks", "long walks", "one global factor", "a factor per domain"],
)
def test_a_yes_is_rare_without_a_domain_factor_and_common_with_one(checkpoints, planted, low, high):
    rng = np.random.default_rng(0)
    drawn = [curves(rng, checkpoints, **planted) for _ in range(400)]
    yes = [exchange_test(np.corrcoef(np.diff(values, axis=0).T), labels)[1] <= 0.05 for values, labels in drawn]
    assert low <= np.mean(yes) <= high


def test_trends_that_differ_by_domain_are_no_reason_to_say_yes():
    rng = np.random.default_rng(0)
    share = np.linspace(0, 1, 40)[:, None]
    values = np.where(np.arange(8) % 2, share, share**6) + rng.normal(0, 0.05, (40, 8))
    found = verdicts(table_of(values, np.arange(8) % 2)).iloc[0]
    assert exchange_test(np.corrcoef(values.T), np.arange(8) % 2)[1] == pytest.approx(1 / 35)
    assert found.gap_of_levels > 0.1
    assert (found.verdict, found.p > 0.1) == ("no", True)


def test_the_errors_are_those_of_a_line_fitted_on_the_first_half():
    rng = np.random.default_rng(2)
    values, labels = curves(rng, 21, tasks=5)
    tokens = 2.0 ** np.arange(21)
    errors = holdout_errors(values, labels, tokens)
    for task in range(5):
        first = values[:10]
        scaled = (values - first.mean(axis=0)) / first.std(axis=0)
        inside = [k for k in range(5) if labels[k] == labels[task] and k != task]
        outside = [k for k in range(5) if labels[k] != labels[task]]
        for name, x in (
            ("in_domain", scaled[:, inside].mean(axis=1)),
            ("out_of_domain", scaled[:, outside].mean(axis=1)),
            ("log_tokens", np.log(tokens)),
        ):
            line = np.polyfit(x[:10], first[:, task], 1)
            assert errors[name][task] == pytest.approx(np.abs(np.polyval(line, x[10:]) - values[10:, task]).mean())
        assert errors["last"][task] == pytest.approx(np.abs(values[9, task] - values[10:, task]).mean())


def test_a_task_alone_in_its_domain_is_not_predicted_from_it():
    values = np.random.default_rng(0).standard_normal((10, 3)).cumsum(axis=0)
    errors = holdout_errors(values, np.array(["a", "a", "b"]), np.arange(10.0))
    assert np.isfinite(errors["in_domain"]).tolist() == [True, True, False]
    assert np.isfinite(errors["out_of_domain"]).all()


def test_a_first_half_that_stands_still_or_begins_at_no_tokens_predicts_its_mean_or_its_trend():
    values = np.random.default_rng(0).standard_normal((10, 4)).cumsum(axis=0)
    values[:5, 0] = 0.25
    tokens = np.array([0.0, *2.0 ** np.arange(9)])
    errors = holdout_errors(values, np.array(list("aabb")), tokens)
    assert errors["in_domain"][0] == pytest.approx(errors["last"][0])
    assert errors["in_domain"][1] == pytest.approx(np.abs(values[:5, 1].mean() - values[5:, 1]).mean())
    log = np.log([0.5, *tokens[1:]])  # 0 tokens are put at half of the first
    line = np.polyfit(log[:5], values[:5, 2], 1)
    assert errors["log_tokens"][2] == pytest.approx(np.abs(np.polyval(line, log[5:]) - values[5:, 2]).mean())


def test_a_verdict_is_declined_with_its_reason():
    rng = np.random.default_rng(0)
    walk = lambda *shape: rng.standard_normal(shape).cumsum(axis=0)
    few = verdicts(table_of(walk(8, 8), list("aaaabbbb"))).iloc[0]
    assert (few.verdict, few.reason.split(" checkpoints")[0]) == ("declined", "fewer than 9")
    assert verdicts(table_of(walk(9, 8), list("aaaabbbb"))).iloc[0].verdict in {"yes", "no"}
    small = verdicts(table_of(walk(30, 6), list("aaabbb"))).iloc[0]
    assert (small.verdict, small.reason) == ("declined", "with these domains no result could have a p below 0.1")
    for labels in ("aaaa", "abcd"):
        one = verdicts(table_of(walk(30, 4), list(labels))).iloc[0]
        assert one.verdict == "declined" and one.reason.startswith("it takes two domains")


def test_a_correlation_that_two_jumps_make_is_said_to_come_from_them():
    steps = np.random.default_rng(0).normal(0, 0.01, (20, 4))
    calm = verdicts(table_of(steps.cumsum(axis=0), list("aaaa"))).iloc[0]
    steps[3] += 0.3
    steps[7] += 0.2
    values = steps.cumsum(axis=0)
    found = verdicts(table_of(values, list("aaaa"))).iloc[0]
    differences = np.diff(values, axis=0)
    upper = np.triu_indices(4, 1)
    assert found.inside == pytest.approx(np.corrcoef(differences.T)[upper].mean())
    rest = np.delete(differences, [2, 6], axis=0)
    assert found.inside_without_jumps == pytest.approx(np.corrcoef(rest.T)[upper].mean())
    assert found.inside > 0.9 > 0.4 > found.inside_without_jumps
    assert f"comes from the 2 largest jumps, without them {found.inside_without_jumps:.2f}" in found.reason
    assert "jumps" not in calm.reason


def test_a_task_that_never_changes_counts_for_nothing():
    values, labels = curves(np.random.default_rng(4), 30)
    stuck = np.column_stack([values, np.full(30, 0.25)])
    with_it = verdicts(table_of(stuck, [*labels, "0"])).iloc[0]
    without = verdicts(table_of(values, labels)).iloc[0]
    assert with_it.drop("checkpoints").equals(without.drop("checkpoints"))
    assert with_it.tasks == 8


def test_the_numbers_of_a_verdict_are_correlations_of_its_series_differences():
    drawn = {name: curves(np.random.default_rng(seed), 30, domain=0.2) for seed, name in enumerate(("one", "two"))}
    units = 10.0 ** np.arange(8)  # of scores in other units the correlations are the same
    table = pd.concat([table_of(values * units, labels, name) for name, (values, labels) in drawn.items()])
    found = verdicts(table).set_index("series")
    for name, (values, labels) in drawn.items():
        same = np.equal.outer(labels, labels)
        mean = lambda steps, which: np.corrcoef(steps.T)[np.triu(which, 1)].mean()
        steps = np.diff(values, axis=0)
        row = found.loc[name]
        assert row.inside == pytest.approx(mean(steps, same))
        assert row.gap == pytest.approx(mean(steps, same) - mean(steps, ~same))
        assert row.gap_of_levels == pytest.approx(mean(values, same) - mean(values, ~same))
        jumps = np.abs(steps / steps.std(axis=0)).sum(axis=1)  # in each curve's own units
        assert row.inside_without_jumps == pytest.approx(mean(steps[np.sort(np.argsort(jumps)[:-2])], same))
        assert (row.checkpoints, row.tasks, row.domains) == (30, 8, 2)


def test_level_and_seed_are_those_asked_for():
    values, labels = curves(np.random.default_rng(4), 30, tasks=17)
    table = table_of(values, labels)
    p = {seed: verdicts(table, seed=seed).iloc[0].p for seed in (0, 1)}
    assert p[0] == verdicts(table).iloc[0].p and p[0] != p[1]
    assert all(5000 * one == pytest.approx(round(5000 * one)) for one in p.values())  # the observed one and 4999
    for level, verdict in ((p[0], "yes"), (p[0] - 1e-9, "no"), (1e-6, "declined")):
        assert verdicts(table, level=level).iloc[0].verdict == verdict


def test_errors_of_predictions_are_given_for_each_task_of_each_series():
    drawn = {name: curves(np.random.default_rng(seed), 12, tasks=5) for seed, name in enumerate(("one", "two"))}
    table = pd.concat([table_of(values, labels, name) for name, (values, labels) in drawn.items()])
    short = table_of(np.ones((3, 2)), ["0", "1"], "of three checkpoints")
    alone = table_of(np.ones((12, 1)), ["0"], "of one task")
    found = prediction.effects(pd.concat([table.sample(frac=1, random_state=0), short, alone]))
    found = found.set_index(["series", "task"]).sort_index()
    assert len(found) == 10
    for name, (values, labels) in drawn.items():
        errors = holdout_errors(values, labels, np.arange(1.0, 13.0))
        for column, error in errors.items():
            assert list(found.loc[name, column]) == pytest.approx(list(error))
        assert list(found.loc[name, "domain"]) == list(labels)


def test_of_two_checkpoints_at_one_token_count_the_last_one_counts():
    values, labels = curves(np.random.default_rng(4), 30)
    again = pd.concat([table_of(values + np.sin(np.arange(30.0))[:, None], labels), table_of(values, labels)])
    assert verdicts(again).equals(verdicts(table_of(values, labels)))


def test_only_checkpoints_that_every_task_has_count():
    values, labels = curves(np.random.default_rng(4), 30)
    table = table_of(values, labels)
    holes = table[~((table.task == "task 3") & table.tokens.isin([5.0, 6.0]))]
    assert verdicts(holes).iloc[0].checkpoints == 28


def test_columns_are_those_that_are_described():
    table = table_of(*curves(np.random.default_rng(4), 30))
    for statistic in (prediction.VERDICTS, prediction.EFFECTS):
        assert list(statistic.compute(table).columns) == [column.name for column in statistic.columns]
        assert list(statistic.compute(table.iloc[:0]).columns) == [column.name for column in statistic.columns]


def test_published_curves_get_the_verdicts_that_were_computed_for_them_before(shared_data):
    folder = shared_data / "trajectories"
    ladder = pd.read_csv(folder / "olmo-ladder" / "peteish7_eval_full.csv")
    ladder = ladder[ladder["_step"] > 0]
    exams = [f"mmlu_{s}_test_mc_5shot_len_norm" for s in ("stem", "humanities", "social_sciences", "other")]
    sense = [f"{s}_val_rc_5shot_len_norm" for s in ("hellaswag", "piqa", "socialiqa", "winogrande", "csqa")]
    values = ladder[[f"eval/downstream/{name}" for name in exams + sense]].to_numpy()
    olmo = verdicts(table_of(values, ["exams"] * 4 + ["sense"] * 5, tokens=ladder["_step"].to_numpy(float))).iloc[0]
    assert (olmo.verdict, round(olmo.p, 3)) == ("yes", 0.008)

    pythia = pd.read_csv(folder / "pythia" / "pythia_v1_tidy.csv.gz")
    pythia = pythia[(pythia.shots == 0) & (pythia.metric == "acc") & (pythia.step >= 512)]
    tasks = ["piqa", "winogrande", "arc_easy", "arc_challenge", "sciq", "lambada_openai"]
    for model in ("pythia-1.4b", "pythia-6.9b", "pythia-12b"):
        wide = pythia[pythia.model == model].pivot(index="tokens", columns="task", values="value")[tasks]
        found = verdicts(table_of(wide.to_numpy(), list("aabbbc"))).iloc[0]
        assert found.verdict == "no" and 0.58 <= found.p <= 0.79

    baichuan = pd.read_csv(folder / "published" / "baichuan2_7b.csv")[["ceval", "mmlu", "cmmlu"]].to_numpy()
    found = verdicts(table_of(baichuan, ["exams"] * 3)).iloc[0]
    assert found.verdict == "declined"
    assert "the correlation of 0.90 comes from the 2 largest jumps, without them 0.41" in found.reason
