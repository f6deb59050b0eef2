"""How many checkpoints of a published series have to be scored until the others can be read off the line between.

    python benchmarks/coarse_to_fine.py SHARED_DATA [SCORES …]

Replays `scoring.series.order` on OLMo-2 7B (186 checkpoints, 40 columns) and on Pythia (27 checkpoints, 8 tasks, all
models), as if each value were scored when it is asked for; and on folders of scores, with the errors of their documents
paired, as `fineline score --until resolved` has them, and as if they were independent.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fineline_jax.checkpoints.series import Checkpoint
from fineline_jax.scoring import score_files
from fineline_jax.scoring.estimates import Value
from fineline_jax.scoring.requests import pack
from fineline_jax.scoring.series import order
from fineline_jax.scoring.series.choice import first_metrics
from fineline_jax.text_table import text_table

DOCUMENTS = {
    "piqa": 1838, "hellaswag": 10042, "arc_easy": 2376, "arc_challenge": 1172, "winogrande": 1267, "boolq": 3270,
    "csqa": 1221, "openbookqa": 500, "socialiqa": 1954,
}  # fmt: skip
VALIDATION_AT_MOST, OF_MMLU = 1000, 3000
"""Documents that are assumed where the file gives no standard error."""
PYTHIA_TASKS = {
    "lambada_openai": "acc", "piqa": "acc", "arc_easy": "acc", "arc_challenge": "acc_norm", "sciq": "acc",
    "winogrande": "acc", "logiqa": "acc_norm", "wsc": "acc",
}  # fmt: skip
PYTHIA_CHECKPOINTS = 27


def replay(tokens: np.ndarray, values: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """(share of the checkpoints that is scored, share of the other values more than two standard errors off).

    tokens: [checkpoints]; values, errors: [checkpoints, tasks].
    """
    series = [Checkpoint("s", str(seen), None, int(seen), Path(), "hf") for seen in tokens]
    tasks = [
        {str(task): Value(*pair, 0) for task, pair in enumerate(zip(*row, strict=True))} for row in zip(values, errors)
    ]
    return replayed(order.axis(series), tasks, values, errors)


def replayed(
    positions: np.ndarray, tasks: Sequence[order.TaskValues], values: np.ndarray, errors: np.ndarray
) -> tuple[float, float]:
    scored = order.replay(positions, tasks.__getitem__)
    others = sorted(set(range(len(tasks))) - set(scored))
    line = np.array([np.interp(positions[others], positions[scored], column[scored]) for column in values.T]).T
    off = np.abs(line - values[others]) > 2 * errors[others]
    return len(scored) / len(tasks), float(off.mean()) if others else math.nan


def own(folder: Path, paired: bool) -> tuple[float, float, int]:
    """Means over the series of a folder of scores, and how many checkpoints they have."""
    made, series = pack.load(folder / "pack"), dict[str, list[score_files.Scores]]()
    for file in score_files.usable_files(folder)[0]:
        one = score_files.read_for(file, made)
        series.setdefault(one.header.series, []).append(one)
    results = []
    for scores in series.values():
        scores.sort(key=lambda one: one.header.tokens or 0)
        heads = [one.header for one in scores]
        positions = order.axis([Checkpoint("s", h.checkpoint, h.step, h.tokens, Path(), "hf") for h in heads])
        tasks = [first_metrics(made, one) for one in scores]
        names = sorted(set.intersection(*map(set, tasks)))
        values, errors = (np.array([[getattr(one[n], k) for n in names] for one in tasks]) for k in ("value", "stderr"))
        if not paired:
            tasks = [{n: dataclasses.replace(v, deviations=None) for n, v in one.items()} for one in tasks]
        results.append(replayed(positions, tasks, values, errors))
    scored, off = np.nanmean(results, axis=0)
    return float(scored), float(off), sum(map(len, series.values()))


def olmo2(data: Path) -> tuple[float, float]:
    frame = pd.read_csv(data / "trajectories/olmo-ladder/peteish7_eval_full.csv")
    wanted = ("len_norm", "_acc")
    columns = [c for c in frame.columns if c.startswith("eval/downstream/") and any(part in c for part in wanted)]
    values = frame[columns].to_numpy()
    sizes = []
    for column in columns:
        size = next((n for task, n in DOCUMENTS.items() if task in column.lower()), OF_MMLU)
        sizes.append(min(size, VALIDATION_AT_MOST) if "val" in column else size)
    errors = np.sqrt(np.clip(values * (1 - values), 0.01, 1) / np.array(sizes))
    return replay(frame["_step"].to_numpy() * 4194304, values, errors)


def pythia(data: Path) -> tuple[float, float, int]:
    """Means over the models, and how many there are."""
    frame = pd.read_csv(data / "trajectories/pythia/pythia_v1_tidy.csv.gz").query("shots == 0")
    results = []
    for _, model in frame.groupby("model"):
        found = [model[(model.task == task) & (model.metric == metric)] for task, metric in PYTHIA_TASKS.items()]
        found = [one.sort_values("tokens")[:PYTHIA_CHECKPOINTS] for one in found if len(one) >= PYTHIA_CHECKPOINTS]
        if found:
            values, errors = (np.array([one[name] for one in found]).T for name in ("value", "stderr"))
            results.append(replay(found[0].tokens.to_numpy(), values, np.maximum(errors, 1e-3)))
    scored, off = np.mean(results, axis=0)
    return float(scored), float(off), len(results)


def main() -> None:
    data = Path(sys.argv[1])
    scored, off = olmo2(data)
    rows = [["series", "scored", "others beyond two standard errors"], ["OLMo-2 7B", f"{scored:.1%}", f"{off:.1%}"]]
    scored, off, models = pythia(data)
    assert not math.isnan(scored)
    rows.append([f"Pythia, mean of {models}", f"{scored:.1%}", f"{off:.1%}"])
    for folder in map(Path, sys.argv[2:]):
        for paired in (True, False):
            scored, off, count = own(folder, paired)
            name = f"{folder} ({count} checkpoints, {'paired' if paired else 'independent'})"
            rows.append([name, f"{scored:.1%}", f"{off:.1%}"])
    print(text_table(rows))


if __name__ == "__main__":
    main()
