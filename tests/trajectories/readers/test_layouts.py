"""What people have gets in: layouts of result trees and tables, each case of shared/data/cases/analyze made again."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineline_jax.cli import main
from fineline_jax.errors import UserError
from fineline_jax.facts.tasks import task_of
from fineline_jax.trajectories.readers.checkpoint_names import identify
from fineline_jax.trajectories.table import read_table

TIDY = "series,tokens,task,metric,value\n"


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def results(
    path: Path, model: str = "m", revision: str = "step1000-tokens4B", scores: dict | None = None, **more
) -> Path:
    """A file of lm-eval 0.4 with one score of arc_easy unless others are given."""
    arguments = f"pretrained={model}" + (f",revision={revision}" if revision else "")
    config = {"model_args": arguments} | more.pop("config", {})
    scores = scores or {"arc_easy": {"acc,none": 0.45, "acc_stderr,none": 0.01}}
    return text(path, json.dumps({"results": scores, "config": config} | more))


# ---- which checkpoint


@pytest.mark.parametrize(
    ("model", "series", "checkpoint"),
    [
        ("/ckpts/run1/step_3000/hf", "run1", "step_3000"),
        ("/ckpts/run1/step_3000/hf_bf16", "run1", "step_3000"),
        ("/ckpts/run1/checkpoint-3000", "run1", "checkpoint-3000"),
        ("/ckpts/run1/iter_0003000", "run1", "iter_0003000"),
        ("/ckpts/run1/ep0-ba3000", "run1", "ep0-ba3000"),
        ("/ckpts/run1/3000", "run1", "3000"),
        ("/ckpts/run1/3000/hf", "run1", "3000"),
        ("/ckpts/run1/global_step3000", "run1", "global_step3000"),
    ],
)
def test_a_checkpoint_is_told_by_a_path(model, series, checkpoint, tmp_path):
    path = results(tmp_path / "results_1.json", model, "")
    with pytest.raises(UserError, match=r"results_1\.json: .* --tokens-per-step"):
        read_table(path)
    [row] = read_table(path, tokens_per_step=10).itertuples()
    assert (row.series, row.checkpoint, row.step, row.tokens) == (series, checkpoint, 3000, 30_000)


def test_a_checkpoint_is_told_by_the_output_folder(tmp_path):
    for step in (1000, 2000):
        results(tmp_path / f"out/step{step}/mine/results_2025-01-01T05.json", "/scratch/export/hf", "")
    table = read_table(tmp_path / "out", tokens_per_step=10)
    assert set(table.series) == {"export"} and list(table.tokens) == [10_000, 20_000]
    assert list(read_table(tmp_path / "out/step1000", tokens_per_step=10).tokens) == [10_000]
    with pytest.raises(UserError, match="neither revision, model nor file name"):  # a year is no step
        read_table(results(tmp_path / "other/2025/results_1.json", "/scratch/2024/run/model", ""), tokens_per_step=1)


def test_stage_2_begins_where_stage_1_ends(tmp_path):
    # configs/series/olmo_2_stage2.yaml: the tokens of stage 1, and 1,024 sequences of 4,096 tokens a step
    start = 3_895_023_632_384
    names = {"stage1-step2000-tokens9B": 9e9, "stage2-ingredient1-step1000-tokens5B": start + 1000 * 4_194_304}
    for i, name in enumerate(names):
        results(tmp_path / f"results_{i}.json", "allenai/OLMo-2-1124-7B", name)
    table = read_table(tmp_path)
    assert dict(zip(table.checkpoint, table.tokens, strict=True)) == names
    assert list(table.series) == ["OLMo-2-1124-7B", "OLMo-2-1124-7B (stage 2, ingredient 1)"]
    [other] = read_table(results(tmp_path / "x/results_1.json", "a/m", "stage2-step10-tokens5B")).itertuples()
    assert (other.series, other.tokens) == ("m (stage 2)", 5e9)  # its start is not known: a series of its own


@given(st.integers(0, 10**7), st.sampled_from(["step{}", "step_{}", "checkpoint-{}", "iter_{:07d}", "ep1-ba{}"]))
def test_every_way_to_write_a_step_is_the_same_step(step, form):
    name = form.format(step)
    for model, revision in ((f"/a/run/{name}", ""), (f"/a/run/{name}/hf", ""), ("/a/run", name)):
        found = identify(Path("/x/results_1.json"), model, revision, root=Path("/x"), tokens_per_step=3)
        assert (found.series, found.step, found.tokens) == ("run", step, 3 * step)


# ---- what a tree holds


@pytest.mark.parametrize("bad", ["NaN", "Infinity", '"N/A"'])
def test_a_value_that_is_no_number_is_left_out_and_named(bad, tmp_path, caplog):
    content = '{"results": {"wic": {"acc,none": BAD, "f1,none": 0.4}}, "model_name": "m-tokens1B"}'.replace("BAD", bad)
    text(tmp_path / "results_1.json", content)
    assert [(row.metric, row.value) for row in read_table(tmp_path).itertuples()] == [("f1", 0.4)]
    assert f"{tmp_path}/results_1.json: left out, no finite number: wic acc" in caplog.text


def test_the_newest_evaluation_counts_and_is_named(tmp_path, caplog):
    for day, value in (("02", 0.7), ("01", 0.6)):
        scores = {"arc_easy": {"acc,none": value, "acc_stderr,none": 0.01}}
        results(tmp_path / f"m/results_2025-01-{day}T10-00-00.json", scores=scores)
    assert list(read_table(tmp_path).value) == [0.7]
    assert "results_2025-01-02T10-00-00.json count, not " in caplog.text
    for name, date, value in (("a", 5, 0.1), ("b", 6, 0.2)):
        results(tmp_path / f"n/results_{name}.json", scores={"piqa": {"acc,none": value}}, date=date)
    assert list(read_table(tmp_path / "n").value) == [0.2]
    results(tmp_path / "n/results_c.json", scores={"piqa": {"acc,none": 0.3}})
    with pytest.raises(UserError, match=r"results_a\.json and .*results_c\.json: \(m, .*, piqa, acc\) occurs twice"):
        read_table(tmp_path / "n")


def test_groups_are_left_out_beside_their_members(tmp_path):
    mmlu = {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.5},
        "mmlu": {"alias": "mmlu", "acc,none": 0.1}, "mmlu_stem": {"alias": " - stem", "acc,none": 0.1},
        "mmlu_anatomy": {"alias": "  - anatomy", "acc,none": 0.3},
        "mine": {"alias": "mine", "acc,none": 0.1}, "mine_a": {"alias": " - a", "acc,none": 0.3},
    }  # fmt: skip
    results(tmp_path / "a/results_1.json", scores=mmlu, group_subtasks=None)
    assert set(read_table(tmp_path / "a").task) == {"arc_easy", "mmlu_anatomy", "mine_a"}
    plain = {task: {"acc": scores["acc,none"]} for task, scores in mmlu.items()}
    results(tmp_path / "b/results_1.json", scores=plain)  # without titles only known groups
    assert set(read_table(tmp_path / "b").task) == {"arc_easy", "mmlu_anatomy", "mine", "mine_a"}
    nested = {"top": {"acc,none": 0.1}, "leaf": {"acc,none": 0.2}}
    results(tmp_path / "c/results_1.json", scores=nested, group_subtasks={"top": ["middle"], "middle": ["leaf"]})
    assert set(read_table(tmp_path / "c").task) == {"leaf"}


def test_scores_of_part_of_the_documents_are_a_series_of_their_own(tmp_path, caplog):
    results(tmp_path / "a/results_1.json", config={"limit": 10.0})
    results(tmp_path / "b/results_1.json")
    assert set(read_table([tmp_path / "a", tmp_path / "b"]).series) == {"m", "m (limit 10)"}
    assert set(read_table(tmp_path).series) == {"m", "m (limit 10)"}
    caplog.clear()
    assert set(read_table(tmp_path / "a").series) == {"m"}
    assert "only a part of the documents, in 1 of 1 files, first " in caplog.text
    assert "the number of shots is not given, in 1 of 1 files, first " in caplog.text


def test_inputs_of_different_shots_are_not_one_curve_however_they_are_grouped(tmp_path):
    for shots, billions in ((0, 1), (5, 2)):
        results(tmp_path / f"{shots}/results_1.json", revision=f"tokens{billions}B", config={"num_fewshot": shots})
    apart, together = read_table([tmp_path / "0", tmp_path / "5"]), read_table(tmp_path)
    assert set(apart.series) == {"m (0-shot)", "m (5-shot)"}
    pd.testing.assert_frame_equal(apart, together)
    results(tmp_path / "other/results_1.json", model="n", config={"num_fewshot": 5})
    assert set(read_table([tmp_path / "0", tmp_path / "other"]).series) == {"m (0-shot)", "n (5-shot)"}
    results(tmp_path / "none/results_1.json", revision="tokens3B")
    assert "m (shots unknown)" in set(read_table(tmp_path).series)


def test_other_json_files_of_a_folder_are_named_and_left_out(tmp_path, caplog):
    text(tmp_path / "README.json", '{"a": 1}')
    results(tmp_path / "old_step1000.json")
    assert len(read_table(tmp_path)) == 1 and "README.json" in caplog.text
    text(tmp_path / "w/x_step1000.json", '{"results": [{"a": 1}], "table_results": {}}')
    with pytest.raises(UserError, match=r"x_step1000\.json: has no table 'results' by task"):
        read_table(tmp_path / "w")


# ---- other tools


def test_results_of_olmes(tmp_path):
    task = {"alias": "arc_easy:rc::olmes", "metrics": {"acc_raw": 0.3, "primary_score": 0.3, "bits_per_byte_corr": 1.2}}
    content = {"tasks": [task], "model_config": {"model": "OLMo-2", "revision": "stage1-step43000-tokens86B"}}
    text(tmp_path / "step43000/metrics.json", json.dumps(content))
    table = read_table(tmp_path)
    assert {row.metric: row.value for row in table.itertuples()} == {"acc_raw": 0.3, "bits_per_byte": 1.2}
    assert set(table.series) == {"OLMo-2"} and set(table.tokens) == {86e9} and set(table.domain) == {"exam"}


@pytest.mark.parametrize("suite", ["leaderboard", "harness"])
def test_results_of_lighteval_and_the_old_leaderboard(suite, tmp_path):
    scores = {"all": {"acc": 0.9}, f"{suite}|arc:challenge|25": {"acc": 0.3, "acc_stderr": 0.01}}
    content = {"config_general": {"model_name": "EleutherAI/pythia-70m-step1000"}, "results": scores}
    [row] = read_table(text(tmp_path / "results_1.json", json.dumps(content))).itertuples()
    assert (row.series, row.task, row.value, row.chance) == ("pythia-70m", "arc:challenge", 0.3, 0.25)
    assert row.tokens == 1000 * 2_097_152


def test_summaries_of_opencompass(tmp_path):
    path = text(
        tmp_path / "summary.csv",
        "dataset,version,metric,mode,m-step1-tokens1B,m-step2-tokens2B\n--- Exam ---,-,-,-,-,-\n"
        "ceval,-,naive_average,ppl,9.00,9.00\nARC-c,1e0de5,accuracy,ppl,0.50,50.50\n",
    )
    table = read_table(path)
    assert list(table.value) == [0.005, 0.505] and list(table.tokens) == [1e9, 2e9]
    assert set(table.metric) == {"acc"} and set(table.domain) == {"exam"} and set(table.series) == {"m"}


def test_exports_of_wandb(tmp_path):
    path = text(
        tmp_path / "w.csv",
        '"Step","a - eval/downstream/arc_easy_acc","a - eval/downstream/arc_easy_acc__MIN","b - eval/arc_easy_acc"\n'
        "100,.26,.26,\n200,.27,.27,.3\n",
    )
    with pytest.raises(UserError, match=r"w\.csv: has steps but no tokens; .* --tokens-per-step"):
        read_table(path)
    table = read_table(path, tokens_per_step=10)
    assert [(r.series, r.tokens, r.task, r.metric, r.value) for r in table.itertuples()] == [
        ("a", 1000, "arc_easy", "acc", 0.26), ("a", 2000, "arc_easy", "acc", 0.27), ("b", 2000, "arc_easy", "acc", 0.3),
    ]  # fmt: skip


def test_a_column_is_a_task_and_a_metric(tmp_path):
    names = "wikitext_word_perplexity,arc_easy/acc,arc_easy/acc_stderr,arc_easy_acc_norm"
    names += ",eval/c4/CrossEntropyLoss,mmlu_x_rc_5shot_bpb"
    table = read_table(text(tmp_path / "t.csv", f"tokens,loss,{names}\n1,9,1,.25,.01,.3,3,4\n"))
    assert {(row.task, row.metric): row.value for row in table.itertuples()} == {
        ("wikitext", "word_perplexity"): 1, ("arc_easy", "acc"): 0.25, ("arc_easy", "acc_norm"): 0.3,
        ("c4", "cross_entropy"): 3, ("mmlu_x_rc", "bits_per_byte"): 4,
    }  # fmt: skip
    assert table.set_index(["task", "metric"]).stderr["arc_easy", "acc"] == 0.01


def test_the_ladder_of_olmo_is_read_as_it_is(shared_data):
    folder = shared_data / "trajectories/olmo-ladder"
    table = read_table(folder)
    assert table.series.nunique() == 31
    raw = pd.read_csv(folder / "peteish7_eval_full.csv")
    mine = table[(table.series == "peteish7_eval_full") & (table.task == "piqa_val_rc")].set_index("metric")
    assert set(mine.index) == {"acc_norm", "bits_per_byte", "choice_prob", "log_choice_prob"}
    np.testing.assert_array_equal(mine.value["acc_norm"], raw["eval/downstream/piqa_val_rc_5shot_len_norm"])
    np.testing.assert_array_equal(mine.value["bits_per_byte"], raw["eval/downstream_bpb/piqa_val_rc_5shot_bpb"])
    np.testing.assert_array_equal(mine.tokens["acc_norm"], raw["_step"] * 4_194_304)
    assert set(mine.domain) == {"commonsense"} and set(mine.chance["acc_norm"]) == {0.5}
    assert set(table.domain) <= {"language modelling", "exam", "commonsense", "reading comprehension", "knowledge"}


# ---- tables


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.tsv", "series\ttokens\ttask\tmetric\tvalue\nx\t1000\tarc_easy\tacc\t.3\n"),
        ("t.csv", "series;tokens;task;metric;value\nx;1000;arc_easy;acc;0,3\n"),
        ("t.csv", "Model,Step,Tokens,Task,Metric,Value\nx,1,1000,arc_easy,acc,.3\n"),
        ("t.csv", TIDY + "x,1K,arc_easy,acc,.3\n"),
        ("t.csv", "model,tokens_B,task,metric,value\nx,.000001,arc_easy,acc,.3\n"),
        ("t.csv", "series,tokens,arc_easy_acc\nx,1000,.3\n"),
        ("x.csv", "tokens,arc_easy\n1000,.3\n"),
        ("t.csv", "task,metric,x-step1-tokens1K\narc_easy,acc,.3\n"),
        ("t.jsonl", '{"series": "x", "tokens": 1000, "task": "arc_easy", "metric": "acc", "value": 0.3}\n\n'),
    ],
)
def test_every_layout_of_a_table_is_the_same_table(name, content, tmp_path):
    for found in (read_table(text(tmp_path / name, content)), read_table(tmp_path)):
        [row] = found.itertuples()
        assert (row.series, row.tokens, row.task, row.metric, row.value) == ("x", 1000, "arc_easy", "acc", 0.3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task,pythia-70m,pythia-160m\narc_easy,.3,.4\n", "column 'pythia-70m' names no checkpoint; headings such as"),
        (
            "task,m-step3\narc_easy,.3\n",
            "'m-step3' names a step but no tokens; .* with --tokens-per-step",
        ),
        ("tokens,loss\n1,2\n", "no column is a score; TASK_METRIC such as arc_easy_acc is wanted"),
        ("series,step,task,metric,value\nx,1,t,acc,.3\n", "has steps but no tokens; .* --tokens-per-step"),
        (TIDY + "x,many,t,acc,.3\n", "column 'tokens' holds 'many' in line 2"),
        (TIDY + "x,1,t,acc,\n", "no row has a finite number in column 'value'"),
        (TIDY + "x,1,t,acc,34\nx,2,t,acc,.5\n", "t acc is 34, but a share is at most 1; .* give --percent"),
        (TIDY + "x,1,t,acc,340\nx,2,t,acc,50\n", "t acc is 340, but a share is at most 1; mend it"),
    ],
)
def test_a_table_that_says_too_little_is_refused_in_a_line_that_names_it(content, message, tmp_path):
    with pytest.raises(UserError, match=rf"/t\.csv: {message}") as error:
        read_table(text(tmp_path / "t.csv", content))
    assert "\n" not in str(error.value)


def test_a_row_without_a_value_is_left_out_and_named(tmp_path, caplog):
    path = text(tmp_path / "t.csv", TIDY + "x,1,t,acc,.3\nx,2,t,acc,\nx,3,t,acc,.4\n")
    assert list(read_table(path).tokens) == [1, 3]
    assert "t.csv: left out, no finite value: 1 rows, first of t in line 3" in caplog.text


def test_percentages_are_recognised_where_nothing_else_can_be_meant(tmp_path, caplog):
    path = text(tmp_path / "t.csv", "series,tokens,task,metric,value,stderr\nx,1,t,acc,24.3,1\nx,2,t,acc,32.9,\n"
                "x,1,t,ppl,30,1\nx,1,t,f1,30,1\n")  # fmt: skip
    found = {(row.metric, row.tokens): (row.value, row.stderr) for row in read_table(path).itertuples()}
    assert found["acc", 1] == pytest.approx((0.243, 0.01)) and found["ppl", 1] == found["f1", 1] == (30, 1)
    assert "percentages are divided by 100: acc" in caplog.text
    mixed = text(tmp_path / "u.csv", TIDY + "x,1,t,acc,34\nx,2,t,acc,.5\n")
    assert list(read_table(mixed, percent=True).value) == pytest.approx([0.34, 0.005])
    assert "by 100: acc; 1 of them are below 1 %, such as t" in caplog.text


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.integers(2, 100), min_size=1, max_size=5))
def test_shares_and_their_percentages_are_the_same_table(values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    lines = [(f"x,{i + 1},piqa,acc,{v}\n", f"x,{i + 1},piqa,acc,{v / 100!r}\n") for i, v in enumerate(values)]
    percent, share = (text(folder / f"{k}.csv", TIDY + "".join(line[k] for line in lines)) for k in (0, 1))
    pd.testing.assert_frame_equal(read_table(percent), read_table(share))
    pd.testing.assert_frame_equal(read_table(percent, percent=True), read_table(share))


# ---- what is known of tasks


def test_names_of_other_tools_lead_to_the_task():
    for name in ("piqa_val_rc", "piqa_val_rc_5shot", "piqa:rc::olmes", "PIQA"):
        assert (task_of(name).name, task_of(name).documents) == ("piqa", None)
    assert task_of("arc:challenge").documents == 1172 and task_of("ARC-c").name == "arc_challenge"
    assert task_of("hendrycksTest-anatomy").domain == "exam" and task_of("my_val").domain == "other"


def test_a_standard_error_is_computed_where_the_documents_are_known(tmp_path, caplog):
    rows = "x,1,piqa,acc,.75\nx,1,mine,acc,.75\nx,1,piqa,bits_per_byte,.75\nx,1,piqa_val,acc,.75\n"
    table = read_table(text(tmp_path / "t.csv", TIDY + rows)).set_index(["task", "metric"])
    assert table.stderr["piqa", "acc"] == pytest.approx((0.75 * 0.25 / 1838) ** 0.5) and table.n["piqa", "acc"] == 1838
    assert table.drop(("piqa", "acc"))[["stderr", "n"]].isna().all(axis=None)
    assert "computed from the number of documents, √(p(1−p)/n): piqa" in caplog.text


def test_a_table_of_tasks_counts_before_what_is_known(tmp_path):
    path = text(tmp_path / "t.csv", TIDY + "x,1,mine,acc,.5\nx,1,mine,bits_per_byte,.5\nx,1,piqa,acc,.5\n")
    tasks = text(tmp_path / "tasks.txt", "task,domain,chance,n\nmine,music,.2,100\n")
    table = read_table(path, tasks_table=tasks).set_index(["task", "metric"])
    assert (table.domain["mine", "acc"], table.chance["mine", "acc"], table.stderr["mine", "acc"]) == (
        "music",
        0.2,
        0.05,
    )
    assert np.isnan(table.chance["mine", "bits_per_byte"]) and table.domain["piqa", "acc"] == "commonsense"
    for content, message in (
        ("name\nx\n", "column 'task'"),
        ("task,chance\nx,1\n", "from 0 to below 1"),
        ("", "cannot"),
    ):
        with pytest.raises(UserError, match=rf"--tasks-table .*tasks\.txt: .*{message}"):
            read_table(path, tasks_table=text(tasks, content))


def test_domain_and_chance_that_one_input_knows_are_those_of_all(tmp_path):
    one = text(tmp_path / "a.csv", TIDY.replace("\n", ",domain,chance\n") + "x,1,mine,acc,.5,music,.2\n")
    two = text(tmp_path / "b.csv", TIDY + "y,1,mine,acc,.5\n")
    table = read_table([two, one])
    assert set(table.domain) == {"music"} and set(table.chance) == {0.2}


# ---- the command


def test_labels_rename_and_join(tmp_path, capsys):
    a, b = (text(tmp_path / f"{n}.csv", TIDY + f"{n},{t},mine,acc,.5\n") for n, t in (("a", 1), ("b", 2)))
    assert set(read_table([a, b], labels={b: "a"}).series) == {"a"}
    text(b, TIDY + "b,2,mine,acc,.5\nc,2,mine,acc,.5\n")
    with pytest.raises(UserError, match=r"--label a=.*b\.csv: holds the series b, c; a label can name one only"):
        read_table([a, b], labels={b: "a"})
    for label in ("a", f"={a}", "a=elsewhere", f"a={a} b={a}"):
        assert main(["analyze", str(a), "--out", str(tmp_path / "r"), "--label", *label.split(" ")]) == 2
        assert "fineline: --label " in capsys.readouterr().err


def test_the_options_of_reading_reach_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("fineline_jax.trajectories.report.html_page.draw_figures", lambda *tables, **options: [])
    path = text(tmp_path / "t.csv", "series,step,task,metric,value\nx,1,mine,acc,34\nx,2,mine,acc,.5\n")
    tasks = text(tmp_path / "tasks.csv", "task,chance\nmine,.2\n")
    assert main(["analyze", str(path), "--out", str(tmp_path / "r"), "--tokens-per-step", "5", "--percent",
                 "--label", f"y={path}", "--tasks-table", str(tasks)]) == 0  # fmt: skip
    table = read_table(tmp_path / "r")
    assert list(table.value) == pytest.approx([0.34, 0.005]) and list(table.tokens) == [5, 10]
    assert set(table.series) == {"y"} and set(table.chance) == {0.2}


def test_every_case_that_was_found_is_read_or_refused_in_a_line(shared_data):
    refused = {"c35_winobias", "c36_wide_models.csv"}
    for case in sorted((shared_data / "cases/analyze").iterdir()):
        if case.name in refused:
            with pytest.raises(UserError, match=case.name.replace(".", r"\.")) as error:
                read_table(case, tokens_per_step=2_097_152)
            assert "\n" not in str(error.value)
        else:
            table = read_table(case, tokens_per_step=2_097_152)
            assert len(table) and table.value.notna().all(), case
            assert (table.value[table.metric.str.startswith("acc")] <= 1).all(), case
