"""From score folders and tables to a report: where scoring's numbers meet trajectories' statistics."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fineline_jax.errors import UserError
from fineline_jax.trajectories.readers.options import ReadOptions

if TYPE_CHECKING:
    import pandas

    from fineline_jax.recipe import Recipe
    from fineline_jax.scoring.requests.pack import Pack
    from fineline_jax.scoring.score_files import Scores
    from fineline_jax.trajectories.report.findings import Results

log = logging.getLogger(__name__)


def analyze_scores(
    scores: Sequence[Path],
    out: Path,
    *,
    runs: Sequence[Path] = (),
    title: str,
    compared: "Results" = (),
    arms: "pandas.DataFrame | None" = None,
    reading: ReadOptions = ReadOptions(),
    figure_style: str = "screen",
    group: str | None = None,
    pick: int = 0,
    growth: bool = False,
    events: Mapping[str, float] = {},
    live: str | None = None,
) -> Path:
    """Write the report of score folders, result trees of other tools and tables; returns report.html.

    runs: run folders whose loss is drawn beside. compared: statistics of a sweep's arms, which come first; arms: its
    columns series, arm, seed. reading: what the inputs do not say themselves. figure_style: see
    `report.style.figure_style`. group: facets of the runs' recipes, as `runs.facets.parse_group` reads them; runs alike
    in all but the seed are replicates. pick: documents that item response picks per task, 0: none.
    growth: whether a law of each curve's growth is fitted. events: name ->
    tokens, of all series, beside those of the runs. live: the series whose state is compared, as `live_state` does.
    A scored checkpoint whose tokens stay unknown is no point of a curve: it is left out, with a warning.
    Raises UserError naming what cannot be read, or a folder of which nothing is left.
    """
    import pandas

    from fineline_jax.checkpoints.open import open_series
    from fineline_jax.scoring import score_files
    from fineline_jax.scoring.metrics import tidy
    from fineline_jax.scoring.requests import pack as packs
    from fineline_jax.trajectories.ablation.arms import with_runs
    from fineline_jax.trajectories.ablation.compare import loss_table
    from fineline_jax.trajectories.report.html_page import write_report
    from fineline_jax.trajectories.report.style import figure_style as style_of
    from fineline_jax.trajectories.runs.events import EVENT_CHANGES
    from fineline_jax.trajectories.runs.item_response import ABILITY, DOCUMENTS
    from fineline_jax.trajectories.runs.live import LIVE_STATE
    from fineline_jax.trajectories.statistics.defects import NOT_SCORED
    from fineline_jax.trajectories.statistics.growth import GROWTH
    from fineline_jax.trajectories.table import join, labelled, read_parts

    if not scores and (group is None or not runs):
        raise UserError(
            "analyze: name at least one folder of scores or table; or --runs with --group, for their losses"
        )
    if any(path.resolve() == out.resolve() for path in scores):
        raise UserError(f"--out {out}: is one of the inputs; give another folder for the report")
    style = style_of(figure_style)
    parts, answers, left_out, facts, scored = [], [], [], dict[str, Any](), []
    for path in scores:
        if (path / "pack" / "manifest.json").is_file():
            pack = packs.load(path / "pack")
            manifest = pack.manifest
            read = [score_files.read_for(file, pack) for file in tidy.usable(path)]
            own = _own_scores(path, pack, read, reading.tokens_per_step)
            scored.append((reading.labels.get(path), pack, read))
            parts += labelled([(str(path), own)], path, reading)
            for series in own["series"].unique():
                name = reading.labels.get(path, series)
                for row in score_files.unscored(path, series):
                    tokens = math.nan if row["tokens"] is None else row["tokens"]
                    left_out.append({"series": name, "tokens": tokens} | {k: row[k] for k in ("checkpoint", "why")})
            if pick:
                answers += labelled([(str(path), _answers(path, pack, read, own))], path, reading)
            alone = sum(other.name == path.name for other in scores) == 1
            facts[f"scores {path.name if alone else path}"] = {
                "suite": manifest["suite"],
                "pack": manifest["hash"][:12],
                "BOS": manifest["bos"],
                "lm-eval": manifest["lm_eval"],
            }
        else:
            parts += read_parts(path, reading)
    if pick and not answers:
        raise UserError(f"--pick {pick}: no input is a folder of `fineline score`, which has the answers; give one")
    logs = [read_log(run) for run in runs]  # before their series: a folder that is no run's is told what it lacks
    names = [open_series(str(run)).name for run in runs]
    names = [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names)]
    losses = pandas.concat([log.assign(series=name) for log, name in zip(logs, names)]) if runs else None
    if losses is not None and group is not None:
        held = loss_table(losses)
        given = {series for _, part in parts for series in part["series"][part["metric"] == "loss"]}
        parts.append(("the validation losses of --runs", held[~held["series"].isin(given)]))
    table, of_arms = _with_recipes(join(parts, reading), dict(zip(names, runs)), group, losses, scored)
    table = table if arms is None else with_runs(table, arms)
    more = []
    if pick:
        joined = pandas.concat([frame for _, frame in answers])
        more = [(one, one.compute(joined, count=pick)) for one in (ABILITY, DOCUMENTS)]
    if live is not None:
        references = [] if reading.reference is None else [reading.reference]
        more.append((LIVE_STATE, LIVE_STATE.compute(table, run=live, references=references)))
    if growth:
        more.append((GROWTH, GROWTH.compute(table)))
    if left_out:
        more.append((NOT_SCORED, NOT_SCORED.compute(left_out)))
    found = [*({"series": "", "event": name, "tokens": tokens} for name, tokens in events.items())]
    found += [event for name, run in zip(names, runs) for event in _events(name, run)]
    if found:
        more.append((EVENT_CHANGES, EVENT_CHANGES.compute(table, pandas.DataFrame(found))))
    return write_report(
        table, out, title=title, facts=facts, losses=losses, compared=[*compared, *of_arms], more=more, checked=True,
        figure_style=style,
    )  # fmt: skip


def _with_recipes(
    table: "pandas.DataFrame",
    runs: Mapping[str, Path],
    group: str | None,
    losses: "pandas.DataFrame | None",
    scored: "Sequence[tuple[str | None, Pack, Sequence[Scores]]]",
) -> "tuple[pandas.DataFrame, Results]":
    """The table with what the recipes of the runs (series -> folder) say: size, FLOPs, and with `group` facets, arm and
    seed; and the statistics of arms that can be computed then, with the documents of what was scored here."""
    from fineline_jax.checkpoints.runs.history import read_history
    from fineline_jax.recipe import from_json
    from fineline_jax.trajectories.ablation.arms import with_runs
    from fineline_jax.trajectories.ablation.compare import compare_arms
    from fineline_jax.trajectories.runs.facets import facets, parse_group

    recipes, branches = {}, {}
    for name, run in runs.items():
        recipe = from_json(run / "recipe.json")
        size: dict[str, float] = {"parameters": recipe.model.parameters}
        size["flops_per_token"] = recipe.model.train_flops_per_token(recipe.data.sequence_length)
        recipes[name] = dataclasses.asdict(recipe) | size
        history = read_history(run)
        begun = [one.tokens for one in (history.segments if history else ()) if one.why == "branch"]
        branches |= {name: begun[-1]} if begun else {}
    for column in ("parameters", "flops_per_token") if recipes else ():
        table[column] = table["series"].map({name: recipe[column] for name, recipe in recipes.items()})
    if group is None:
        return table, []
    if not recipes:
        raise UserError(f"--group {group}: the fields are those of recipes; name the folders of the runs with --runs")
    wanted = parse_group(group)
    who = facets(recipes, wanted)
    several = [name for name in wanted if name != "seed" and who[name].nunique() > 1]
    batch = next((name for name, field in wanted.items() if field == "batch.sequences"), None)
    table = with_runs(table, who)
    if len(branches) == len(recipes):
        who["branch"] = who["series"].map(branches)
    documents = document_scores(table, scored)
    return table, list(compare_arms(table, who, several, logs=losses, documents=documents, batch=batch).items())


def document_scores(
    table: "pandas.DataFrame", scored: "Iterable[tuple[str | None, Pack, Iterable[Scores]]]"
) -> "pandas.DataFrame | None":
    """Columns series, metric, task, document, value: the score of each document at the end of each run, in the first
    metric of each task; None: there are none.

    table: the scores. scored: the name of the one series (None: each has its own), the pack and the scores of each
    folder. The mean over documents is the run's end in `end_values`; a metric that is no mean over documents (a ratio
    of sums, F1) is left out.
    """
    import pandas

    from fineline_jax.scoring.metrics import tidy
    from fineline_jax.trajectories.ablation.arms import end_values, late_checkpoints

    key, rows = ["series", "metric", "task"], []
    for name, pack, read in scored:
        first = {task["task"]: task["metric"] for task in pack.tasks}
        own = table[table["metric"] == table["task"].map(first)]
        late = [late_checkpoints(part) for _, part in own.groupby(key[1:], sort=False, observed=True)]
        at = dict(tuple(pandas.concat(late).groupby(["series", "checkpoint"], observed=True))) if late else {}
        for scores in read:
            place = name or scores.header.series, scores.header.checkpoint
            if place in at:
                each = tidy.of_documents(pack, scores.loglikelihood, scores.is_greedy)
                rows.append(each.merge(at[place][key], on=["metric", "task"]))
    if not rows:
        return None
    ends = pandas.concat(rows).rename(columns={"doc": "document"}).groupby([*key, "document"])["value"].mean()
    means = ends.groupby(key).mean().rename("mean").reset_index().merge(end_values(table), on=key)
    other = means["task"][(means["mean"] - means["value"]).abs() > 1e-9]
    ends = ends.reset_index()
    return ends[~ends["task"].isin(other)]


def _events(series: str, run: Path) -> "Iterator[dict]":
    """Columns series, event, tokens: where the run's schedule changes, and where another recipe goes on."""
    from fineline_jax.checkpoints.runs.history import read_history

    history = read_history(run)
    segments = history.segments if history is not None else ()
    for number, segment in enumerate(segments):
        recipe, end = segment.recipe, segments[number + 1].tokens if number + 1 < len(segments) else math.inf
        schedule = recipe.optimizer.schedule
        decays = {
            "wsd": [("decay of the learning rate begins", recipe.tokens - schedule.decay_tokens)],
            "multistep": [
                (f"learning rate times {factor:g}", at * recipe.tokens) for at, factor in schedule.milestones
            ],
        }
        found = [*decays.get(schedule.kind, []), ("warmup ends", schedule.warmup_tokens)]
        found += [(f"batch of {sequences} sequences", tokens) for tokens, sequences in recipe.batch.schedule]
        found = [(what, tokens) for what, tokens in found if segment.tokens < tokens < end]
        if number:
            found.append((", ".join(segment.changes) or segment.why, segment.tokens))
        yield from ({"series": series, "event": what, "tokens": tokens} for what, tokens in found)


def _answers(folder: Path, pack: "Pack", read: "Sequence[Scores]", table: "pandas.DataFrame") -> "pandas.DataFrame":
    """Columns series, checkpoint, tokens, task, document, value (1 right, 0 wrong) of every document that has an
    accuracy, at the checkpoints of the table."""
    import numpy as np
    import pandas

    from fineline_jax.scoring.metrics import documents

    known = table.drop_duplicates(["series", "checkpoint"]).set_index(["series", "checkpoint"])["tokens"]
    tables = [one for one in documents.tables(pack) if not one.task["own_metrics"]]
    parts = []
    for scores in read:
        place = scores.header.series, scores.header.checkpoint
        if place not in known.index:
            continue
        for one in tables:
            if np.isnan(scores.loglikelihood[one.requests]).any():
                continue  # asked by a later pack than that of these scores
            right = documents.columns(one, scores.loglikelihood, scores.is_greedy).get("acc")
            if right is not None:
                said = {"series": place[0], "checkpoint": place[1], "tokens": known[place], "task": one.task["task"]}
                parts.append(pandas.DataFrame({"document": range(len(right)), "value": right}).assign(**said))
    if not parts:
        raise UserError(f"--pick: {folder} has no task with an accuracy of single documents; leave the option out")
    return pandas.concat(parts)


def _own_scores(
    folder: Path, pack: "Pack", read: "Sequence[Scores]", tokens_per_step: float | None
) -> "pandas.DataFrame":
    """The table of a folder of scores: guessing as it does on the pack's documents, and a bootstrap over them."""
    from fineline_jax.scoring.metrics import guessing, resampled, tidy

    table = _with_known_tokens(tidy.of_scores(folder, pack, read), folder, tokens_per_step)
    # A group stands for its members (MMLU for its 57 subjects); both would count twice in a domain.
    members = {task for group in pack.manifest["groups"] for task in group["tasks"]}
    shots = {task["task"]: task["shots"] for task in pack.tasks}
    table = table[~table.task.isin(members)].assign(limit=pack.manifest["limit"])
    table = table.assign(shots=table.task.map(shots), chance_from="")
    for task, guess in guessing.guesses(pack).items():
        guessed = (table.task == task) & table.metric.str.startswith("acc")
        table.loc[guessed, ["chance", "chance_from"]] = [guess.level, guess.chooser]
    drawn = resampled.deviations(pack, read)
    return table.merge(drawn, on=["series", "checkpoint", "task", "metric"], how="left", validate="one_to_one")


def _with_known_tokens(table: "pandas.DataFrame", folder: Path, tokens_per_step: float | None) -> "pandas.DataFrame":
    if tokens_per_step is not None:
        of_steps = (table["step"].astype("Float64") * tokens_per_step).round().astype("Int64")
        table = table.assign(tokens=table["tokens"].fillna(of_steps))
    unknown = table["tokens"].isna()
    if unknown.any():
        remedy = "" if table["step"][unknown].isna().all() else "give --tokens-per-step, or "
        if unknown.all():
            raise UserError(
                f"{folder}: no checkpoint has a known number of training tokens, so there is no curve; {remedy}write "
                f"their metrics with `fineline export-scores {folder} --out FOLDER`"
            )
        names = ", ".join(dict.fromkeys(table["series"][unknown] + " " + table["checkpoint"][unknown]))
        hint = "; --tokens-per-step gives them" if remedy else ""
        log.warning("%s: left out, the number of training tokens is not known%s: %s", folder, hint, names)
    return table[~unknown]


def read_log(run: Path) -> "pandas.DataFrame":
    """The training log of a run with the column flops, and where the norms of micro-batches were logged those of
    `noise_scale`. Raises UserError for a folder without one."""
    import pandas

    from fineline_jax.recipe import from_json
    from fineline_jax.training.metrics import read_metrics

    lines = read_metrics(run)
    if not lines:
        raise UserError(f"{run / 'metrics.jsonl'}: not there; give the folder of a run")
    frame = pandas.DataFrame(lines)
    if "loss" not in frame:
        raise UserError(f"{run / 'metrics.jsonl'}: holds no loss yet; analyze the run when it has trained")
    recipe = from_json(run / "recipe.json")
    frame["flops"] = frame["tokens"] * recipe.model.train_flops_per_token(recipe.data.sequence_length)
    return with_batches(frame, recipe) if "micro_gradient_norm" in frame else frame


def with_batches(log: "pandas.DataFrame", recipe: "Recipe") -> "pandas.DataFrame":
    """The log of a run with the columns sequences, micro_sequences and tokens_per_sequence of each step's batch."""
    import numpy as np

    length, sizes = recipe.data.sequence_length, recipe.batch.sizes
    before = [[tokens - size * length for size in sizes] for tokens in log["tokens"]]
    # the update that ended at these tokens began one batch before, and that batch is the one due there
    sequences = [
        next((n for n, start in zip(sizes, starts, strict=True) if recipe.batch.sequences_at(start) == n), sizes[-1])
        for starts in before
    ]
    micro = np.array(sequences) / recipe.batch.accumulation
    return log.assign(sequences=sequences, micro_sequences=micro, tokens_per_sequence=length)
