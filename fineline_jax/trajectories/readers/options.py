"""What a user says about the inputs that the inputs do not say themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ReadOptions:
    """Options of `trajectories.table.read_table`."""

    tokens_per_step: float | None = None
    """For checkpoints of which only the step is known."""
    percent: bool = False
    """Accuracies and other shares of the tables are percentages."""
    labels: Mapping[Path, str] = field(default_factory=dict)
    """Input -> name of its one series."""
    tasks_table: Path | None = None
    """CSV with a column `task` and any of `domain`, `chance`, `n`: it counts before what is known of a task."""
    until: float | None = None
    """Checkpoints of more tokens are left out, so that all series have one horizon."""
    share: float | None = None
    """Of the way from guessing to perfect: the score that tokens are counted to; None: half."""
    ceiling: float | None = None
    """The highest score that can be reached, to which the way from guessing is counted; None: 1, or the table's."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Metric, or task with a chance level -> that score; counts before `share`."""
    series: Sequence[str] = ()
    """Names or patterns (m-*) of the series that are kept; none: all."""
    tasks: Sequence[str] = ()
    """The same of tasks."""
    reference: str | None = None
    """The series that comes first: what others are compared with."""
