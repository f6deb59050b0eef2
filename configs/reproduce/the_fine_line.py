"""What public checkpoint series say of the findings of arXiv 2404.01204, "The Fine Line": docs/the_fine_line.md.

    python configs/reproduce/the_fine_line.py SHARED/data [--out docs/the_fine_line.md] [--demo DEMO/report/tidy.csv]

SHARED/data/trajectories holds the public tables: Pythia, OLMo's ladder and OLMo-2 7B, Baichuan2, OpenLLaMA. A few
minutes on one core; the fits of the scaling laws take most of them.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from scipy import stats

from fineline_jax.atomic_files import atomic_file, write_atomic
from fineline_jax.trajectories.curves.smooth import checkpoint_noise
from fineline_jax.trajectories.report.style import COLOURS, FigureStyle
from fineline_jax.trajectories.runs.promotion import kendall_w
from fineline_jax.trajectories.sizes.gaps import size_gaps
from fineline_jax.trajectories.sizes.passing import size_clocks
from fineline_jax.trajectories.statistics.columns import format_tokens
from fineline_jax.trajectories.statistics.comparison import compare
from fineline_jax.trajectories.statistics.dynamics import summarise
from fineline_jax.trajectories.statistics.growth import growth
from fineline_jax.trajectories.statistics.laws import Run
from fineline_jax.trajectories.statistics.prediction import verdicts
from fineline_jax.trajectories.statistics.scaling import forecast
from fineline_jax.trajectories.statistics.similarity import similarity
from fineline_jax.trajectories.table import read_table

HOLDS, NOT, UNSAID = "holds", "does not hold", "cannot be said"
WORDS = {"yes": HOLDS, "no": NOT, "declined": UNSAID}
SIZES = ("160m", "410m", "1b-bf16", "1.4b", "2.8b", "6.9b", "12b")
RISING = ("lambada_openai", "piqa", "sciq", "arc_easy", "arc_challenge", "winogrande")
CONTROLS = ("logiqa", "wsc")
BATCH_TASKS = ("arc_challenge", "arc_easy", "lambada_openai", "piqa", "sciq", "winogrande", "logiqa")
EXAMS = tuple(f"mmlu_{s}_test_mc" for s in ("stem", "humanities", "social_sciences", "other"))
SENSE = ("hellaswag_val_rc", "piqa_val_rc", "socialiqa_val_rc", "winogrande_val_rc", "csqa_val_rc")
MMLU = {"stem": 0.215, "humanities": 0.335, "social_sciences": 0.219, "other": 0.231}
"""Shares of the documents of MMLU."""
LADDER = {
    "HellaSwag": "hellaswag_val_rc", "ARC-Challenge": "arc_challenge_test_rc", "ARC-Easy": "arc_easy_test_rc",
    "PIQA": "piqa_val_rc", "CSQA": "csqa_val_rc", "SIQA": "socialiqa_val_rc", "OBQA": "openbookqa_test_rc", "MMLU": "",
}  # fmt: skip
CLOZE = "OLMo-2 7B, cloze, acc_norm", "OLMo-2 7B, cloze, bits_per_byte"
PHASES = {"to 500 B": (0, 5e11), "500 B to 1 T": (5e11, 1e12), "1 T to 2 T": (1e12, 2e12), "from 2 T": (2e12, 5e12)}


@dataclass(frozen=True)
class Finding:
    title: str
    claim: str
    verdict: str
    says: Sequence[str]
    """Sentences."""
    rows: pd.DataFrame
    """Cells as text."""
    draw: Callable[[Axes], Any]
    figure: str
    """File name without suffix, and caption after a colon."""


def task_prediction(pythia: pd.DataFrame, olmo: pd.DataFrame, baichuan: pd.DataFrame) -> Finding:
    chosen = olmo[olmo["task"].isin([*EXAMS, *SENSE]) & (olmo["tokens"] > 0) & (olmo["metric"] == "acc_norm")]
    small = pythia[pythia["task"].isin(RISING) & (pythia["step"] >= 512) & (pythia["metric"] == "acc")]
    domains = {"piqa": "a", "winogrande": "a", "lambada_openai": "c"}
    small = small.assign(domain=small["task"].map(domains).fillna("b"))
    parts = [chosen.assign(domain=np.where(chosen["task"].isin(EXAMS), "exams", "common sense"), series="OLMo-2 7B")]
    cloze = olmo[olmo["task"].isin([*(task.replace("_mc", "_rc") for task in EXAMS), *SENSE]) & (olmo["tokens"] > 0)]
    cloze = cloze.assign(domain=np.where(cloze["task"].isin(SENSE), "common sense", "exams"))
    parts += [cloze[cloze["metric"] == name.split()[-1]].assign(series=name) for name in CLOZE]
    parts += [small[small["series"] == f"pythia-{size}"] for size in ("1.4b", "6.9b", "12b")]
    found = pd.concat([verdicts(part) for part in [*parts, baichuan.assign(domain="exams", series="Baichuan2 7B")]])
    cells = found.assign(gap=found["gap"].map(number), levels=found["gap_of_levels"].map(number))
    cells["p"] = found["p"].map(lambda p: number(p, 3))
    by = found.set_index("series")
    pairs = [f"{name} {by.p[name]:.2f}" for name in ("pythia-1.4b", "pythia-6.9b", "pythia-12b")]
    says = [
        f"OLMo-2 7B: {by.verdict['OLMo-2 7B']}, p = {by.p['OLMo-2 7B']:.3f}; its exam tasks move together from "
        "checkpoint to checkpoint more than with common sense. Most of that is the format: these exams "
        "ask for a letter, common sense is asked as a cloze. With both as cloze the gap is "
        f"{by.gap[CLOZE[0]]:.2f}, p = {by.p[CLOZE[0]]:.3f} by accuracy, and {by.gap[CLOZE[1]]:.2f}, "
        f"p = {by.p[CLOZE[1]]:.2f} by bits per byte.",
        f"Pythia: {', '.join(sorted(set(by.verdict[[f'pythia-{s}' for s in ('1.4b', '6.9b', '12b')]])))} "
        f"(p: {', '.join(pairs)}), by six tasks at {by.checkpoints['pythia-1.4b']} checkpoints.",
        f"Baichuan2 7B, the paper's own example, {by.verdict['Baichuan2 7B']}: {by.reason['Baichuan2 7B']}. So the "
        "correlations of .88 to .92 of its three exams come from the first two jumps.",
        "Correlations of the scores themselves are no evidence: any two curves that grow correlate.",
    ]

    def draw(axes: Axes) -> None:
        shown = found[found["gap"].notna()]
        places = np.arange(len(shown))
        axes.barh(places - 0.18, shown["gap_of_levels"], 0.34, color="#c9ced6", label="scores themselves")
        axes.barh(places + 0.18, shown["gap"], 0.34, color=COLOURS[0], label="first differences")
        axes.set_yticks(places, shown["series"])
        axes.axvline(0, color="#5c6470", linewidth=1)
        axes.set_xlabel("correlation inside domains minus across")

    columns = ["series", "checkpoints", "tasks", "gap", "levels", "p", "verdict"]
    rows = cells[columns].rename(columns={"gap": "gap of differences", "levels": "gap of levels"})
    return Finding(
        "Task dynamic prediction", "Within a domain, the dynamics of known tasks predict those of unseen tasks.",
        "; ".join(f"{WORDS[by.verdict[name]]} for {of}" for name, of in (
            ("OLMo-2 7B", "OLMo-2 7B by accuracy"), (CLOZE[1], "it by bits per byte"), ("pythia-12b", "Pythia"),
            ("Baichuan2 7B", "Baichuan2"))), says, rows.fillna("–"), draw,
        "prediction: Correlation inside domains minus across domains, of differences (which are tested) and of scores.",
    )  # fmt: skip


def cross_domain(pythia: pd.DataFrame, olmo: pd.DataFrame) -> Finding:
    late = olmo[(olmo["tokens"] > 0) & (olmo["metric"] == "acc_norm") & olmo["task"].isin([*SENSE, *EXAMS])]
    times = summarise(late).set_index("task")
    shown = times.sort_values("rank")
    of_sizes = summarise(pythia[pythia["task"].isin(RISING) & (pythia["metric"] == "acc")])
    sizes = [f"pythia-{size}" for size in SIZES]
    onsets = of_sizes[of_sizes["series"].isin(sizes)].pivot(index="task", columns="series", values="onset").dropna()
    w, _, p = kendall_w(onsets.to_numpy())
    order = ", ".join(onsets.rank().mean(axis=1).sort_values().index)
    says = [
        f"OLMo-2 7B reaches half of the way from guessing to perfect in {int(shown['to_score'].notna().sum())} of "
        f"{len(shown)} tasks; the table has them in the order of learning. Intervals hold the scatter from checkpoint "
        "to checkpoint, as the public file has no standard errors.",
        f"Pythia, onsets of {len(onsets)} tasks in {onsets.shape[1]} sizes: {order}. The order agrees between sizes: "
        f"Kendall's W {w:.2f}, p = {p:.1g}.",
        "The sizes share their corpus and questions, so that this order is one of these tasks and this corpus; whether "
        "it leads from basic to advanced is not tested, as nothing here says how advanced a task is.",
        "That one domain's knowledge helps another would take runs in which that domain is left out; an order of "
        "curves of one corpus does not show it.",
    ]  # fmt: skip

    def draw(axes: Axes) -> None:
        known = shown[shown["to_score"].notna() & np.isfinite(shown["to_score_high"])]
        intervals(axes, known["to_score"], known["to_score_low"], known["to_score_high"], list(known.index))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: format_tokens(x))
        axes.xaxis.set_minor_formatter(lambda x, _: "")
        axes.set_xlabel("tokens to half of the way to perfect")

    cells = shown.reset_index()
    ends = lambda name: cells.apply(lambda r: between(r[f"{name}_low"], r[f"{name}_high"]), axis=1)
    rows = pd.DataFrame({
        "task of OLMo-2 7B": cells["task"], "to the score": cells["to_score"].map(tokens), "95 %": ends("to_score"),
        "t90": cells["t90"].map(tokens), "t90, 95 %": ends("t90"), "verdict": cells["verdict"],
    })  # fmt: skip
    return Finding(
        "Cross-domain promotion",
        "Tasks are learned in an order from basic to advanced, as in a curriculum; knowledge of one domain helps "
        "another.", f"{HOLDS if p < 0.05 else UNSAID} for one order at all sizes; {UNSAID} for its sense and the help",
        says, rows, draw, "order: Tokens to half of the way from guessing to perfect, OLMo-2 7B, with 95 % intervals.",
    )  # fmt: skip


def strategy(five_shot: pd.DataFrame) -> Finding:
    table = five_shot[five_shot["metric"] == "acc"]
    found = compare(table, "pythia-1.4b-1MtokBS", "pythia-1.4b", tasks=list(BATCH_TASKS))

    def points(row: Any) -> str:
        return f"{100 * row.difference:+.2f} ± {100 * row.stderr_tasks:.2f}"

    by, every = found.set_index("window"), compare(table, "pythia-1.4b-1MtokBS", "pythia-1.4b").iloc[0]
    says = [
        f"Pythia 1.4b with batches of 1 M tokens minus that with 2 M, at equal tokens, over {by.tasks['all']} tasks, "
        f"in points: first three checkpoints {points(by.loc['first'])} (p = {by.p['first']:.2g}), all "
        f"{by.checkpoints['all']} {points(by.loc['all'])}, last five {points(by.loc['last'])}.",
        "These errors are over tasks. With what two runs of one recipe differ by, estimated from the scatter of "
        f"checkpoints, they are {', '.join(f'{100 * error:.2f}' for error in found['stderr'])}; p and intervals hold "
        "both. The early difference is beyond chance, the late ones are not.",
        f"These seven tasks were chosen before. Over all {every.tasks} of the file, most of which stay at guessing, "
        f"the first three checkpoints differ by {points(every)}, p = {every.p:.2f}: not told from none.",
        "Five reruns of OLMo's ladder, compared alike over all tasks, metrics and windows, are called in 3 of 75 "
        "tests, by accuracy over all checkpoints in none of five (a test of this package checks it).",
        "Data quality, learning rate, regularisation and architecture: no public pair of runs here differs in one of "
        "them alone.",
    ]

    def draw(axes: Axes) -> None:
        value, low, high = (100 * found[name] for name in ("difference", "low", "high"))
        intervals(axes, value, low, high, ["first three", "all", "last five"], at=0)
        axes.set_xlabel("points in favour of the smaller batch")

    rows = pd.DataFrame({
        "window": found["window"], "checkpoints": found["checkpoints"].astype(str),
        "difference, points": [points(row) for row in rows_of(found)],
        "95 %": [f"{100 * r.low:+.2f} to {100 * r.high:+.2f}" for r in rows_of(found)],
        "p": found["p"].map(lambda p: number(p, 3)), "verdict": found["verdict"],
    })  # fmt: skip
    return Finding(
        "Training strategy", "Batch size, learning rate, data quality, regularisation and architecture change how fast "
        "a model learns early.",
        f"{HOLDS if by.verdict['first'] == 'better' else UNSAID} for the batch size, early; {UNSAID} for the rest",
        says, rows, draw, "strategy: Difference of the run with half the batch, with 95 % intervals.",
    )  # fmt: skip


def scale_gap(pythia: pd.DataFrame, openllama: pd.DataFrame) -> Finding:
    rows = []
    for name, table, large, small in (
        ("Pythia 12b − 1.4b", pythia[pythia["metric"].eq("acc")], "pythia-12b", "pythia-1.4b"),
        ("OpenLLaMA 13b − 3b", openllama[openllama["metric"].str.startswith("acc")], "open_llama_13b", "open_llama_3b"),
    ):
        stuck = {"wsc", "logiqa"} if large.startswith("pythia") else set()
        table = table[table["chance"].notna() & (table["domain"] != "exam") & ~table["task"].isin(stuck)]
        last = table.sort_values("tokens").drop_duplicates(["series", "task", "metric"], keep="last")
        ends = last.assign(above=(last["value"] - last["chance"]) / (1 - last["chance"]))
        both = ends.pivot(index=["domain", "task", "metric"], columns="series", values="above")[[large, small]].dropna()
        both = both.groupby(["domain", "task"]).last()  # acc_norm where both models have it, else acc
        for domain, part in (both[large] - both[small]).groupby("domain"):
            count, gap = len(part), 100 * part.mean()
            half = 100 * stats.t.ppf(0.975, count - 1) * part.std() / np.sqrt(count) if count > 1 else np.nan
            rows.append({"pair": name, "domain": domain, "tasks": count, "gap": gap, "half": half})
    found = pd.DataFrame(rows)
    learned = pythia["metric"].eq("acc") & pythia["task"].isin(RISING)
    pair = size_gaps(pythia[learned & pythia["series"].isin(["pythia-1.4b", "pythia-12b"])])
    course = []
    for domain, part in pair.groupby("domain", sort=False):
        three = part.iloc[[-5, -3, -1]]  # at a sixteenth and at a quarter of the tokens, and at the end
        of = ", ".join(f"{100 * r.gap:+.1f} ± {50 * (r.gap_high - r.gap_low):.1f}" for r in rows_of(three))
        course.append(f"{domain} {of} ({part['ratio'].iloc[-1]:.2f} times at the end)")
    says = [
        "Pythia 12b minus 1.4b over tokens, at a sixteenth, a quarter and all of 300 B, in points above chance, with "
        f"95 % intervals over questions: {'; '.join(course)}.",
        "Gaps are of scores above chance, in points, at the last checkpoint; the interval is over tasks, so that a "
        "domain of one task has none.",
        "The public tables hold no task of reasoning that is learned: LogiQA is at chance in every Pythia, and "
        "arithmetic, code and GSM8K are in none of them. WSC, which stays at the majority value, is left out too.",
        "Domains of one to five tasks have intervals too wide to order their gaps, so that neither half of the finding "
        "can be tested here.",
    ]

    def draw(axes: Axes) -> None:
        names = [f"{r.domain} ({r.tasks}), {r.pair}" for r in rows_of(found)]
        intervals(axes, found["gap"], found["gap"] - found["half"], found["gap"] + found["half"], names, at=0)
        axes.set_xlabel("points above chance, large minus small")

    cells = pd.DataFrame({
        "pair": found["pair"], "domain": found["domain"], "tasks": found["tasks"].astype(str),
        "gap, points": found["gap"].map(lambda v: f"{v:+.1f}"),
        "95 % over tasks": ["–" if np.isnan(h) else f"± {h:.1f}" for h in found["half"]],
    })  # fmt: skip
    return Finding(
        "Scale and reasoning", "Larger models are better at reasoning above all; on common sense small ones come "
        "close.", UNSAID, says, cells, draw, "scale: Gap between a large and a small model by domain.",
    )  # fmt: skip


def laws(ladder: pd.DataFrame, facts: dict[str, dict]) -> Finding:
    def ends(series: str, task: str, metric: str) -> Any:
        names = [f"mmlu_{s}_test_rc" for s in MMLU] if task == "MMLU" else [LADDER[task]]
        part = ladder[(ladder["series"] == series) & ladder["task"].isin(names) & (ladder["metric"] == metric)]
        values = part.pivot(index="step", columns="task", values="value")[names]
        return values @ (np.array(list(MMLU.values())) if task == "MMLU" else np.ones(1))

    def run(series: str, size: str, task: str) -> Run:
        fact, score = facts[size], ends(series, task, "acc_norm")
        seen = score.index.to_numpy(float) * fact["batch_size_tokens"]
        loss = ends(series, task, "bits_per_byte")
        return Run(size, fact["n_params"], fact["flops_per_token"], seen, loss.to_numpy(), score.to_numpy())

    made = []
    for largest, sizes in (("3B", ("190M", "370M", "760M", "1B", "3B")), ("1B", ("190M", "370M", "760M", "1B"))):
        for task in LADDER:
            runs = [run(f"{size}-{x}xC", size, task) for size in sizes for x in (1, 2, 5, 10)]
            found = forecast(runs, [run("peteish7_eval_full", "7B", task)])
            made.append({"up to": largest, "task": task} | found)
    found = pd.DataFrame(made)
    error = found.groupby("up to")["error"].mean() * 100
    best = found.groupby("up to")["error_of_best_small"].mean() * 100
    refused = found[found["verdict"] == "refused"]
    inside = int(((found["low"] <= found["measured"]) & (found["measured"] <= found["high"])).sum())
    gains = growth(ladder[(ladder["series"] == "peteish7_eval_full") & (ladder["metric"] == "acc_norm")])
    kept = gains[gains["verdict"] == "kept"]
    good = error["3B"] <= 1.5 and error["1B"] <= 2.1 and (error < best / 2).all()
    says = [
        f"From runs up to 3B, OLMo-2 7B at 3.88 T tokens (stage 1) is predicted with a mean error of {error['3B']:.2f} "
        f"points over eight tasks; the best small run is {best['3B']:.1f} points away. From runs up to 1B: "
        f"{error['1B']:.2f} and {best['1B']:.1f}.",
        "The form is chosen per task by a back-test on the largest size that is not the target. Single "
        "forms, used for all tasks, were fitted once apart from this script: two steps in operations 1.47, in "
        "parameters and tokens 1.79, direct 2.25 (from 3B); 2.18, 3.03, 2.78 (from 1B). Means of the forms that have a "
        "back-test do not help: weighted by its inverse square 1.47 and 1.93, unweighted 1.80 and 2.22. The best form "
        "of each task, known only afterwards, would give 1.01 and 1.44.",
        (f"The back-test refuses {len(refused)} of {len(found)} forecasts" + (
            f", whose mean error is {100 * refused['error'].mean():.2f} points against "
            f"{100 * found[found['verdict'] == 'kept']['error'].mean():.2f} for those kept." if len(refused) else ".")),
        "A rule that keeps the half of the tasks with half the error of the others was looked for, once apart from "
        "this script, at four horizons (760M to 1B, 1B to 3B, 1B and 3B to 7B). Error of the kept over that of the "
        "refused, by: back-test .71, .87, 1.28, 1.91; spread of the forms 1.34, .95, 1.38, 1.69; jackknife .71, 1.23, "
        ".54, .58; gain predicted 1.57, 2.96, .87, .60; scatter of the last checkpoints 1.37, .33, .37, .93. None "
        "holds at all four. With the errors known afterwards the best halves give .51, .18, .37, .28, and of all 70 "
        "halves 0, 13, 7 and 7 % reach one half: eight tasks cannot tell such a rule from luck.",
        f"One run alone, OLMo-2 7B: a saturating power law or a sigmoid in log tokens keeps its back-test in "
        f"{len(kept)} of {len(gains)} curves of accuracy. The last doubling of tokens gave a median of "
        f"{100 * kept['gain'].median():.1f} points, above 0 with the whole interval in "
        f"{int((kept['gain_low'] > 0).sum())}; the next would give "
        f"{100 * kept['next_gain'].median():.1f}, less than the last in "
        f"{int((kept['next_gain'] < kept['gain']).sum())}: returns that diminish are not seen in so few doublings, "
        "beyond the logarithm of tokens itself.",
        f"Of {int(found['low'].notna().sum())} intervals, of a bootstrap with an error per size, {inside} hold the "
        "measured score. They are wide, as four or five sizes leave two or three degrees of freedom.",
    ]  # fmt: skip

    def draw(axes: Axes) -> None:
        for k, (largest, part) in enumerate(found.groupby("up to", sort=False)):
            at = np.arange(len(part)) + (k - 0.5) * 0.28
            axes.hlines(at, 100 * part["low"], 100 * part["high"], color=COLOURS[k], linewidth=1)
            axes.scatter(
                100 * part["predicted"], at, color=COLOURS[k], s=16, label=f"from runs up to {largest}", zorder=3
            )
        part = found[found["up to"] == "3B"]
        at = np.arange(len(part))
        axes.scatter(100 * part["measured"], at, marker="|", s=120, color="black", label="OLMo-2 7B", zorder=4)
        axes.scatter(100 * part["best_small"], at, marker="x", s=16, color="#8a8f98", label="best run up to 3B")
        axes.set_yticks(at, part["task"])
        axes.set_ylim(len(part) - 0.5, -0.5)
        axes.set_xlim(25, 95)
        axes.set_xlabel("accuracy, %")

    share = lambda name: found[name].map(lambda v: "–" if np.isnan(v) else f"{100 * v:.1f}")
    rows = pd.DataFrame({
        "runs up to": found["up to"], "task": found["task"], "form": found["form"], "back-test": share("backtest"),
        "predicted": share("predicted"),
        "95 %": [f"{a} to {b}" if a != "–" else "–" for a, b in zip(share("low"), share("high"), strict=True)],
        "measured": share("measured"), "error": share("error"), "best small run": share("best_small"),
        "verdict": found["verdict"],
    })  # fmt: skip
    return Finding(
        "Scaling law of metrics", "Scores follow a law of data and size, not only the loss; more data helps, with "
        "diminishing returns.", f"{HOLDS if good else NOT} for these eight tasks; {UNSAID} for diminishing returns",
        says, rows, draw,
        "laws: Scores of OLMo-2 7B predicted from the ladder, with 95 % intervals (bootstrap over sizes).",
    )  # fmt: skip


def across_sizes(pythia: pd.DataFrame) -> Finding:
    late = pythia[(pythia["step"] >= 512) & pythia["metric"].isin(["acc", "acc_norm"])]
    late = late[(late["metric"] == "acc") | (late["task"] == "arc_challenge")]
    late = late[~late["task"].str.startswith(("hendrycks", "crows"))]
    late = late[(late["task"] != "arc_challenge") | (late["metric"] == "acc_norm")]
    found = similarity(late, [f"pythia-{size}" for size in SIZES]).sort_values("levels", ascending=False)
    sizes = [f"pythia-{size}" for size in SIZES]
    whole, half = jackknife(lambda of: similarity(late, of).set_index("task")["levels"], sizes)
    rising = late[late["task"].isin(RISING)]
    more, margin = jackknife(lambda of: beyond_other_tasks(rising, of), sizes)
    of_levels = beyond_other_tasks(rising, sizes, levels=True)
    control = found[found["task"].isin(CONTROLS)]["levels"].max()
    alike = {t: "control" if t in CONTROLS else HOLDS if more[t] > margin[t] else UNSAID for t in found["task"]}
    names = lambda word: ", ".join(task for task in found["task"] if alike[task] == word)
    clocks = size_clocks(late[late["series"].isin([f"pythia-{size}" for size in SIZES]) & late["task"].isin(RISING)])
    kept, off = (clocks[clocks["verdict"] == word] for word in ("kept", "refused"))
    inside = int(((kept["predicted_low"] <= kept["tokens"]) & (kept["tokens"] <= kept["predicted_high"])).sum())
    passed = clocks[(clocks["small"] == "1.4 B") & clocks["tokens"].notna()]
    says = [
        "Small sizes predict when 12b has their final score: a line in log parameters through the sizes in between "
        f"misses by a median of {kept['error'].median():.2f} doublings of tokens and by "
        f"{100 * kept['score_error'].median():.1f} points in the {len(kept)} cases that a back-test on 6.9b keeps "
        f"({off['error'].median():.2f} and {100 * off['score_error'].median():.1f} in the {len(off)} refused); "
        f"{inside} of {len(kept)} intervals hold the tokens. The table holds no seeds of Pythia to compare "
        "that with. 12b passes the final score of 1.4b, which took 300 B tokens, at: "
        + ", ".join(
            f"{r.task} {format_tokens(r.tokens)} ({between(r.tokens_low, r.tokens_high)})" for r in rows_of(passed)
        )
        + ".",
        "Rank correlation of the same task in two sizes at matched tokens, steps from 512, mean over the pairs of "
        "seven sizes (160m to 12b); the interval leaves out one size at a time.",
        "LogiQA and WSC are not learned by any size and serve as controls: their largest correlation is "
        f"{control:.2f}. Above it with the whole interval: "
        f"{', '.join(t for t in found['task'] if t not in CONTROLS and whole[t] - half[t] > control)}.",
        "That alone is no evidence for a task: curves of two different tasks that rise correlate about as much between "
        f"two sizes (one task's correlation is {of_levels.min():+.2f} to {of_levels.max():+.2f} above theirs). The "
        "verdict is on first differences: whether those of one task in two sizes correlate more than those of two "
        f"tasks. They do, with the whole interval, for {names(HOLDS)}; not told: {names(UNSAID)}.",
    ]

    def draw(axes: Axes) -> None:
        at = found["task"]
        intervals(axes, whole[at], whole[at] - half[at], np.minimum(1, whole[at] + half[at]), list(at), label="scores")
        axes.scatter(
            found["differences"], range(len(found)), color=COLOURS[1], s=16, marker="s", label="first differences"
        )
        axes.set_xlabel("mean rank correlation between sizes")

    rows = pd.DataFrame({
        "task": found["task"], "metric": found["metric"], "levels": found["levels"].map(number),
        "95 % over sizes": [f"{whole[t] - half[t]:.2f} to {min(1.0, whole[t] + half[t]):.2f}" for t in found["task"]],
        "differences": found["differences"].map(number),
        "beyond other tasks": [f"{more[t]:+.2f} ± {margin[t]:.2f}" if t in more else "–" for t in found["task"]],
        "verdict": [alike[task] for task in found["task"]],
    })  # fmt: skip
    return Finding(
        "Dynamics across sizes", "The dynamics of a task are alike at every size.",
        f"{HOLDS} for {sum(word == HOLDS for word in alike.values())} of {len(alike) - len(CONTROLS)} "
        "tasks that are learned",
        says, rows, draw,
        "sizes: Mean rank correlation of curves between sizes of Pythia, with 95 % intervals (jackknife over sizes).",
    )  # fmt: skip


def watching(olmo: pd.DataFrame) -> Finding:
    names = {
        "acc_norm": "accuracy",
        "choice_prob": "probability of the correct choice",
        "bits_per_byte": "bits per byte",
    }
    of_metric = olmo.groupby("metric")["task"].unique()
    tasks = sorted(set(of_metric["bits_per_byte"]) & set(of_metric["acc_norm"]))
    rows = []
    for phase, (start, end) in PHASES.items():
        ratios = {name: [] for name in names}
        for task in tasks:
            for metric in names:
                curve = olmo[(olmo["task"] == task) & (olmo["metric"] == metric)]
                curve = curve[(curve["tokens"] > start) & (curve["tokens"] <= end)].sort_values("tokens")
                values, quarter = curve["value"].to_numpy(), max(2, len(curve) // 4)
                noise = checkpoint_noise(values, curve["tokens"].to_numpy())
                ratios[metric].append(abs(values[-quarter:].mean() - values[:quarter].mean()) / noise)
        better = np.log2(np.array(ratios["bits_per_byte"]) / np.array(ratios["acc_norm"]))
        half = stats.t.ppf(0.975, len(better) - 1) * stats.sem(better)
        row = {"phase": phase, "gain": better.mean(), "half": half}
        rows.append(row | {name: float(np.median(values)) for name, values in ratios.items()})
    found = pd.DataFrame(rows)
    clear = found[found["gain"] - found["half"] > 0]["phase"].tolist()
    says = [
        f"OLMo-2 7B, {len(tasks)} cloze tasks: signal (change over a phase) over noise (from checkpoint to "
        "checkpoint), median over tasks.",
        f"Bits per byte tell the state of a run better than accuracy in {len(clear)} of {len(found)} phases "
        f"({', '.join(clear)}), by the interval over tasks of the ratio of the two.",
    ]

    def draw(axes: Axes) -> None:
        for k, (metric, label) in enumerate(names.items()):
            axes.plot(found["phase"], found[metric], marker="o", color=COLOURS[k], label=label)
        axes.set_yscale("log")
        axes.set_ylabel("signal over noise")

    cells = found[["phase"]].assign(**{label: found[name].map(lambda v: f"{v:.1f}") for name, label in names.items()})
    cells["bits per byte over accuracy"] = [
        f"× {2**r.gain:.1f} ({2 ** (r.gain - r.half):.1f} to {2 ** (r.gain + r.half):.1f})" for r in rows_of(found)
    ]
    return Finding(
        "Metrics for phases", "Which metric shows the state of a run depends on the phase of training.",
        f"{HOLDS if clear else UNSAID}: bits per byte are ahead of accuracy in {len(clear)} of {len(found)} phases",
        says, cells, draw,
        "metrics: Signal over noise of three metrics in four phases of OLMo-2 7B.",
    )  # fmt: skip


def of_demo(path: Path) -> str:
    """A paragraph on the demo's own series."""
    found = summarise(read_table(path))
    found = found[found["metric"] == "acc"].sort_values("rank")
    words = found["verdict"].value_counts()
    first = ", ".join(
        f"{r.task} ({format_tokens(r.to_score)})" for r in rows_of(found.head(3)) if r.to_score == r.to_score
    )
    counts = ", ".join(f"{name}: {count}" for name, count in words.items())
    return f"The demo's series, one run of a million parameters: {counts}. Tokens to the score, the first: {first}.\n"


def beyond_other_tasks(table: pd.DataFrame, sizes: Sequence[str], *, levels: bool = False) -> pd.Series:
    """By task: mean rank correlation of its first differences in two sizes, minus that with other tasks of a size.

    levels: of the scores themselves.
    """
    chosen = table[table["series"].isin(sizes)].pivot(index="step", columns=["series", "task"], values="value").dropna()
    of = (chosen if levels else chosen.diff()).corr("spearman")
    size, task = (of.index.get_level_values(name).to_numpy() for name in ("series", "task"))
    apart, own = size[:, None] != size, task[:, None] == task
    means = {t: [of.to_numpy()[(task == t)[:, None] & apart & same].mean() for same in (own, ~own)] for t in set(task)}
    return pd.Series({t: one - others for t, (one, others) in means.items()})


def jackknife(statistic: Callable[[list[str]], pd.Series], sizes: list[str]) -> tuple[pd.Series, pd.Series]:
    """The statistic and half of its 95 % interval, by leaving out one size at a time."""
    parts = pd.DataFrame([statistic([name for name in sizes if name != out]) for out in sizes])
    stderr = np.sqrt((len(sizes) - 1) / len(sizes) * ((parts - parts.mean()) ** 2).sum())
    return statistic(sizes), stats.t.ppf(0.975, len(sizes) - 1) * stderr


def intervals(
    axes: Axes, value: Any, low: Any, high: Any, names: Sequence, *, at: float | None = None, label: str | None = None
) -> None:
    """A point with its interval per row, the first at the top; at: where nothing would lie."""
    rows = np.arange(len(names))
    axes.hlines(rows, low, high, color=COLOURS[0])
    axes.scatter(value, rows, color=COLOURS[0], zorder=3, s=16, label=label)
    axes.set_yticks(rows, names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if at is not None:
        axes.axvline(at, color="#5c6470", linewidth=1, linestyle=(0, (4, 3)))


def between(low: float, high: float) -> str:
    if np.isfinite(low) and not np.isfinite(high):
        return f"> {format_tokens(low)}"
    return "–" if np.isnan(low) else f"{format_tokens(low)} to {format_tokens(high)}"


def rows_of(frame: pd.DataFrame) -> Any:
    return frame.itertuples()


def number(value: Any, digits: int = 2) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def tokens(value: Any) -> str:
    return "–" if np.isnan(value) else format_tokens(value)


def markdown(rows: pd.DataFrame) -> str:
    """A table whose columns are as wide as their longest cell."""
    cells = [list(rows.columns), *rows.astype(str).to_numpy().tolist()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(rows.columns))]
    line = lambda row: "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
    return "\n".join([line(cells[0]), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, cells[1:])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/the_fine_line.md"))
    parser.add_argument("--demo", type=Path, help="tidy.csv of the demo's report")
    options = parser.parse_args()
    folder = options.data / "trajectories"
    pythia = read_table(folder / "pythia" / "pythia_v1_tidy.csv.gz")
    shots = {n: pythia[pythia["series"].str.endswith(f"({n}-shot)")] for n in (0, 5)}
    shots = {n: part.assign(series=part["series"].str.removesuffix(f" ({n}-shot)")) for n, part in shots.items()}
    models = json.loads((folder / "olmo-ladder/model_facts.json").read_text())["models"]
    files = sorted((folder / "olmo-ladder").glob("*.csv"))
    ladder = read_table([path for path in files if "rerun" not in path.stem and "0.5x" not in path.stem])
    olmo = ladder[ladder["series"] == "peteish7_eval_full"]
    findings = [
        task_prediction(shots[0], olmo, read_table(folder / "published" / "baichuan2_7b.csv")),
        cross_domain(shots[0], olmo),
        strategy(shots[5]),
        scale_gap(shots[0], read_table(folder / "openllama_readme.csv")),
        laws(ladder, {model["size"]: model for model in models}),
        across_sizes(shots[0]),
        watching(olmo),
    ]
    write(findings, options.out, of_demo(options.demo) if options.demo else "")


def write(findings: Sequence[Finding], out: Path, demo: str) -> None:
    style = FigureStyle(inches=6.0)
    figures = out.parent / "figures" / out.stem
    figures.mkdir(parents=True, exist_ok=True)
    text = [
        "# The Fine Line's findings on public series\n",
        "The paper (Yang et al. 2024, arXiv 2404.01204) reads the training of large language models from scores at "
        "many checkpoints. This page asks what public checkpoint series say of each finding: Pythia (70m to 12b), "
        "OLMo's ladder (190M to 3B) and OLMo-2 7B, Baichuan2 7B (read off its report's figure), OpenLLaMA (its "
        "README). It is made by `configs/reproduce/the_fine_line.py`; its numbers are computed there with the "
        "statistics of [Analysis](analyze.md).\n",
        "A verdict needs an interval or a test that can say no; where the public tables cannot decide, "
        "the page says so.\n",
        markdown(pd.DataFrame({"finding": [f.title for f in findings], "verdict": [f.verdict for f in findings]}))
        + "\n",
    ]
    with matplotlib.rc_context(style.settings):
        for finding in findings:
            name, _, caption = finding.figure.partition(": ")
            figure = Figure(figsize=(6.0, max(2.2, 0.9 + 0.26 * min(len(finding.rows), 14))), layout="constrained")
            axes = figure.add_subplot()
            finding.draw(axes)
            if axes.get_legend_handles_labels()[0]:
                figure.legend(loc="outside lower center", ncols=2)
            FigureCanvasSVG(figure)
            with atomic_file(figures / f"{name}.svg") as partial:
                figure.savefig(partial, format="svg", metadata={"Date": None})
            text += [
                f"## {finding.title}\n", f"The paper: {finding.claim}\n", f"**Verdict: {finding.verdict}.**\n",
                *(f"{sentence}\n" for sentence in finding.says),
                f"![{caption}](figures/{out.stem}/{name}.svg)\n", f"{caption}\n", markdown(finding.rows) + "\n",
            ]  # fmt: skip
    text += ["## The demo\n", demo] if demo else []
    write_atomic(out, "\n".join(text))


if __name__ == "__main__":
    main()
