"""Which checkpoint of a series is opened next, as `order` says, and which are not scored."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from fineline_jax.atomic_files import write_atomic
from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.multihost import broadcast_from_process_0
from fineline_jax.scoring import score_files
from fineline_jax.scoring.job_shard import WHOLE, JobShard
from fineline_jax.scoring.metrics.resampled import with_deviations
from fineline_jax.scoring.metrics.tidy import of_tasks
from fineline_jax.scoring.options import Until
from fineline_jax.scoring.requests.pack import Pack
from fineline_jax.scoring.series import order
from fineline_jax.text_table import counted


class Choice:
    """Which checkpoint of a series is opened next: process 0 chooses and all follow it.

    While there are checkpoints without scores, SERIES/order.json beside the scores names them (`score_files.unscored`).
    """

    def __init__(
        self,
        series: Series,
        finished: Sequence[Checkpoint],
        pack: Pack,
        out: Path,
        until: Until,
        part: JobShard = WHOLE,
    ):
        self.series, self.all, self.pack, self.out = series, series.checkpoints, pack, out
        self.file = score_files.order_file(out, series.name, part)
        self.failed: dict[int, str] = {}
        self.done = {index for index, one in enumerate(self.all) if one in finished}
        positions = order.axis(self.all)
        self.fixed = iter(order.coarse_to_fine(positions, sorted(self.done)) if until == "all" else ())
        self.refinement: order.Refinement | None = None
        if until == "resolved":
            self.refinement = order.Refinement(positions, {index: self._values(index) for index in sorted(self.done)})

    def next(self) -> Checkpoint | None:
        """The next one; None: none before the one that is open has been added."""
        if self.refinement is None:
            chosen = next(self.fixed, None)
        else:
            chosen = broadcast_from_process_0(self.refinement.next() if jax.process_index() == 0 else None)
        return None if chosen is None else self.all[chosen]

    def add(self, checkpoint: Checkpoint, failed: str = "") -> None:
        """It has been scored, or could not be, for the reason `failed`."""
        index = self.all.index(checkpoint)
        self.done.add(index)
        if failed:
            self.failed[index] = failed
        if self.refinement is not None and jax.process_index() == 0:
            self.refinement.add(index, None if failed else self._values(index))
        self._note("not scored yet")

    def left_out(self) -> list[Checkpoint]:
        """What was never chosen; ask at the end."""
        self._note("between two whose scores differ by no more than their errors")
        return [one for index, one in enumerate(self.all) if index not in self.done]

    def fineness(self, checkpoint: Checkpoint) -> str:
        """How fine the curve is once `checkpoint` is scored."""
        gap = order.largest_gap(len(self.all), self.done | {self.all.index(checkpoint)})
        return f", then at most {counted(gap, 'checkpoint')} between two points" if gap else ""

    def _note(self, why: str) -> None:
        """Keep what has no scores, and why; `why` is that of what was not chosen."""
        reasons = {i: self.failed.get(i, why) for i in range(len(self.all)) if i in self.failed or i not in self.done}
        if jax.process_index() != 0:
            return
        if not reasons:
            self.file.unlink(missing_ok=True)
        elif self.file.parent.is_dir():  # a command that fails leaves no folder
            rows = [
                {"checkpoint": one.name, "step": one.step, "tokens": one.tokens, "why": reasons[index]}
                for index, one in enumerate(self.all) if index in reasons
            ]  # fmt: skip
            write_atomic(self.file, json.dumps({"series": self.series.name, "not_scored": rows}, indent=1) + "\n")

    def _values(self, index: int) -> order.TaskValues:
        if jax.process_index() != 0:
            return {}
        path = score_files.path_of(self.out, self.series.name, self.all[index].name)
        return first_metrics(self.pack, score_files.read_for(path, self.pack))


def first_metrics(pack: Pack, scores: score_files.Scores) -> order.TaskValues:
    """Of each task, with the deviations of its documents; without those whose standard error needs a bootstrap."""
    values = of_tasks(pack, scores.loglikelihood, scores.is_greedy, resample=False)
    values = with_deviations(pack, scores, values)
    asked = [(row["task"], row["metric"]) for row in pack.tasks]
    return {task: values[task][metric] for task, metric in asked if metric in values.get(task, {})}
