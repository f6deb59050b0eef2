"""Which checkpoint of a series is opened next, as `order` says."""

from collections.abc import Sequence
from pathlib import Path

import jax

from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.multihost import broadcast_from_process_0
from fineline_jax.scoring import score_files
from fineline_jax.scoring.metrics.tidy import of_tasks
from fineline_jax.scoring.options import Until
from fineline_jax.scoring.requests.pack import Pack
from fineline_jax.scoring.series import order
from fineline_jax.text_table import counted


class Choice:
    """Which checkpoint of a series is opened next: process 0 chooses and all follow it."""

    def __init__(self, series: Series, finished: Sequence[Checkpoint], pack: Pack, out: Path, until: Until):
        self.series, self.all, self.pack, self.out = series, series.checkpoints, pack, out
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

    def add(self, checkpoint: Checkpoint, *, scored: bool) -> None:
        """It has been scored, or could not be."""
        index = self.all.index(checkpoint)
        self.done.add(index)
        if self.refinement is not None and jax.process_index() == 0:
            self.refinement.add(index, self._values(index) if scored else None)

    def left_out(self) -> list[Checkpoint]:
        """What was never chosen; ask at the end."""
        return [one for index, one in enumerate(self.all) if index not in self.done]

    def fineness(self, checkpoint: Checkpoint) -> str:
        """How fine the curve is once `checkpoint` is scored."""
        gap = order.largest_gap(len(self.all), self.done | {self.all.index(checkpoint)})
        return f", then at most {counted(gap, 'checkpoint')} between two points" if gap else ""

    def _values(self, index: int) -> order.TaskValues:
        if jax.process_index() != 0:
            return {}
        path = score_files.path_of(self.out, self.series.name, self.all[index].name)
        return _first_metrics(self.pack, score_files.read(path))


def _first_metrics(pack: Pack, scores: score_files.Scores) -> order.TaskValues:
    """(value, standard error) of the metric that each task reports first; without those that need a bootstrap."""
    values = of_tasks(pack, scores.loglikelihood, scores.is_greedy, resample=False)
    first = {row["task"]: row["metric"] for row in pack.tasks}
    return {
        task: (values[task][metric].value, values[task][metric].stderr)
        for task, metric in first.items()
        if metric in values[task]
    }
