"""Every case of shared/data/cases/analyze has the values that its README calls right, transcribed from its files."""

import pytest

from fineline_jax.errors import UserError
from fineline_jax.trajectories.table import read_table

BATCH = 2_097_152  # tokens of a step of Pythia, and what the README gives as --tokens-per-step
STEPS = (512, 1000, 3000, 13000, 43000, 143000)
EARLY = (1, 512, 1000, 3000, 13000, 43000)
ACC = (0.4, 0.45, 0.45, 0.5, 0.5, 0.55)  # of arc_easy, in the order of the steps
STAGE_1 = 3_895_023_632_384  # tokens of OLMo-2's stage 1 by the README; a step of stage 2 has 1,024 x 4,096

# case: series, task, metric -> tokens and values. Where a case holds several curves those that could go wrong stand.
CURVES = {
    "c01_new": {("pythia-70m", "arc_easy", "acc"): (STEPS, ACC)},
    "c02_args_dict": {("pythia-70m", "arc_easy", "acc"): (STEPS, ACC)},
    "c05_samples": {("pythia-70m", "arc_easy", "acc"): (STEPS, ACC)},
    "c06_filters": {
        ("pythia-70m", "gsm8k", "exact_match (strict-match)"): (STEPS, (0.01,) * 6),
        ("pythia-70m", "gsm8k", "exact_match (flexible-extract)"): (STEPS, (0.02,) * 6),
    },
    "c07_shots": {
        ("pythia-70m (0-shot)", "arc_easy", "acc"): (STEPS, (0.3,) * 6),
        ("pythia-70m (5-shot)", "arc_easy", "acc"): (STEPS, (0.4,) * 6),
    },
    "c12_lighteval": {("pythia-70m", "arc:challenge", "acc"): (STEPS, (0.3,) * 6)},
    "c14_hfboard": {
        ("pythia-70m", "arc:challenge", "acc"): (STEPS, (0.3,) * 6),
        ("pythia-70m", "hendrycksTest-anatomy", "acc"): (STEPS, (0.26,) * 6),
    },
    "c15_nan": {
        ("pythia-70m", "arc_easy", "acc"): (STEPS, ACC),
        ("pythia-70m", "wic", "acc"): ((512, 1000, 13000, 43000, 143000), (0.5,) * 5),
    },
    "c16_na": {
        ("pythia-70m", "wic", "acc"): (STEPS, (0.5,) * 6),
        ("pythia-70m", "wic", "f1"): (STEPS, (0.4,) * 6),
    },
    "c34_extra": {("pythia-70m", "arc_easy", "acc"): ((1000,), (0.3,))},
    "c40_acc_pct": {
        ("pythia-70m", "arc_easy", "acc"): (STEPS, (0.33, 0.34, 0.34, 0.35, 0.35, 0.36)),
        ("pythia-70m", "arc_easy", "acc_norm"): (STEPS, (0.3298, 0.3398, 0.3398, 0.3498, 0.3498, 0.3598)),
    },
    "d01_inf": {
        ("pythia-70m", "wikitext", "bits_per_byte"): (EARLY, (1.2,) * 6),
        ("pythia-70m", "wikitext", "word_perplexity"): (EARLY[1:], (40.0,) * 5),
    },
    "d03_noshot": {("pythia-70m", "arc_easy", "acc"): (EARLY, (0.3, 0.4, 0.45, 0.45, 0.5, 0.5))},
    "d04_limit": {("pythia-70m", "arc_easy", "acc"): (EARLY, (0.3, 0.4, 0.45, 0.45, 0.5, 0.5))},
    # ---- the checkpoint is in a path, its tokens are those of the option
    **{
        case: {(series, "arc_easy", "acc"): (STEPS, ACC)}
        for case, series in (
            ("c03_hf_leaf", "run1"), ("c04_trainer", "run1"), ("c21_outdir", "export"), ("c22_iter", "run1"),
            ("c24_plain", "run1"),
        )
    },
    "c11_wandb.csv": {("run1", "arc_easy", "acc"): ((1000, 2000, 3000, 4000, 5000), (0.26, 0.27, 0.28, 0.29, 0.3))},
    "c20_step_only.csv": {("x", "arc_easy", "acc"): ((100, 200, 300, 400, 500), (0.26, 0.27, 0.28, 0.29, 0.3))},
    "c17_wide.csv": {
        ("c17_wide", "arc_easy", "acc"): ((1000, 2000, 3000, 4000, 5000), (0.26, 0.27, 0.28, 0.29, 0.3)),
        ("c17_wide", "piqa", "acc"): ((1000, 2000, 3000, 4000, 5000), (0.505, 0.51, 0.515, 0.52, 0.525)),
    },
    **{
        case: {("pythia-70m", f"mmlu_{task}", "acc"): (STEPS, (value,) * 6)
               for task, value in (("anatomy", 0.27), ("astronomy", 0.23))}
        for case in ("c30_group_noSub", "c31_group", "c32_group_sep")
    },
}  # fmt: skip
# the same with tokens instead of steps
TOKENS = {
    "c10_olmes": {
        ("OLMo-2", "arc_easy:rc::olmes", metric): ((1e9, 2e9, 6e9, 26e9, 86e9, 286e9), (value,) * 6)
        for metric, value in (("acc_raw", 0.3), ("acc_per_char", 0.31), ("bits_per_byte", 1.2))
    },
    "c18_tidy.tsv": {("x", "arc_easy", "acc"): ((1,), (0.3,))},
    "c19_semicolon.csv": {("x", "arc_easy", "acc"): ((1000,), (0.3,))},
    "c27_caps.csv": {("x", "arc_easy", "acc"): ((1000,), (0.3,))},
    "c28_tokens_unit.csv": {("x", "arc_easy", "acc"): ((1e9, 2e9), (0.3, 0.3))},
    "c38_noseries_nan.csv": {("x", "arc_easy", "acc"): ((1e9, 3e9, 4e9, 5e9), (0.3, 0.4, 0.45, 0.5))},
    "percent.csv": {
        ("x", "mmlu", "acc"): (
            (220e9, 440e9, 660e9, 880e9, 1100e9, 1320e9, 1540e9, 1760e9),
            (0.243, 0.329, 0.465, 0.464, 0.482, 0.501, 0.51, 0.521),
        )
    },
    **{
        case: {
            ("OLMo-2-1124-7B", "arc_easy", "acc"): ((first, 210e9, 2098e9), (value, 0.45, 0.7)),
            ("OLMo-2-1124-7B (stage 2, ingredient 1)", "arc_easy", "acc"): (
                (STAGE_1 + 1000 * 4_194_304, STAGE_1 + 11_931 * 4_194_304),
                (0.78, 0.8),
            ),
        }
        for case, first, value in (("c25_olmo2", 5e9, 0.3), ("c26_olmo2_clean", 9e9, 0.32))
    },
}
REFUSED = {  # in one line that names the file and says what is wanted
    "c35_winobias": r"x_step1000\.json: has no table 'results' by task",
    "c36_wide_models.csv": r"c36_wide_models\.csv: .*columns series, tokens, task, metric, value",
}
VERDICTS = {"decline.csv", "t50_before_onset.csv", "wsc_snr.csv"}  # tests/trajectories/test_verdicts.py
PATHS = ("c03_hf_leaf", "c04_trainer", "c21_outdir", "c22_iter", "c24_plain")
NEEDS_TOKENS = (*PATHS, "c11_wandb.csv", "c20_step_only.csv")
SAID = {
    "c15_nan": "results_3000.json: left out, no finite number: wic acc",
    "c34_extra": "c34_extra/README.json",
    "c38_noseries_nan.csv": "left out, no finite value: 1 rows, first of arc_easy in line 3",
    "c40_acc_pct": "percentages are divided by 100: acc, acc_norm",
    "d01_inf": "results_1.json: left out, no finite number: wikitext word_perplexity",
    "d03_noshot": "the number of shots is not given, in 6 of 6 files, first ",
    "d04_limit": "only a part of the documents, in 6 of 6 files, first ",
    "percent.csv": "percentages are divided by 100: acc",
}
WHOLE = {**{c: {k: ([s * BATCH for s in x], y) for k, (x, y) in v.items()} for c, v in CURVES.items()}, **TOKENS}


def test_no_case_is_without_a_check(shared_data):
    assert {path.name for path in (shared_data / "cases/analyze").iterdir()} == {*WHOLE, *REFUSED, *VERDICTS}


@pytest.mark.parametrize("case", WHOLE)
def test_a_case_has_the_values_of_its_files(case, shared_data, caplog):
    path = shared_data / "cases/analyze" / case
    table = read_table(path, tokens_per_step=BATCH if case in NEEDS_TOKENS else None)
    found = {key: (list(rows.tokens), list(rows.value)) for key, rows in table.groupby(["series", "task", "metric"])}
    for key, (tokens, values) in WHOLE[case].items():
        assert found[key][0] == pytest.approx(tokens, rel=1e-12) and found[key][1] == pytest.approx(values), key
    assert set(table.series) == {key[0] for key in WHOLE[case]}
    # neither groups beside their members nor the leaderboard's mean of all tasks
    assert set(table.task) <= {key[1] for key in WHOLE[case]} | {"arc_easy"}
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if case in SAID:
        assert any(SAID[case] in line for line in said), said
    else:  # nothing is left out of a case that is whole
        assert not any("left out" in line or "percent" in line for line in said), said


@pytest.mark.parametrize("case", [*NEEDS_TOKENS, *REFUSED])
def test_a_case_that_says_too_little_is_refused_in_a_line_that_names_its_file(case, shared_data):
    wanted = REFUSED.get(case, rf"{case.replace('.', '[.]')}.*--tokens-per-step")
    with pytest.raises(UserError, match=wanted) as error:
        read_table(shared_data / "cases/analyze" / case)
    assert "\n" not in str(error.value)
