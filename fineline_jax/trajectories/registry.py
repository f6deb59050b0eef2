"""The statistics that a report holds: each is computed, written, drawn and documented from its entry here."""

from fineline_jax.trajectories.ablation.differences import DIFFERENCES
from fineline_jax.trajectories.ablation.final_map import FACET_COST, FINAL_MAP
from fineline_jax.trajectories.ablation.tokens_to import TOKENS_TO
from fineline_jax.trajectories.runs.agreement import DIPS, ORDER_AGREEMENT
from fineline_jax.trajectories.runs.early_slopes import EARLY_SLOPES
from fineline_jax.trajectories.runs.events import EVENT_CHANGES
from fineline_jax.trajectories.runs.item_response import ABILITY, DOCUMENTS
from fineline_jax.trajectories.runs.live import LIVE_STATE
from fineline_jax.trajectories.runs.promotion import CONCORDANCE, PRECEDENCE
from fineline_jax.trajectories.runs.quality import EARLY_DECISIONS, PHASE_QUALITY
from fineline_jax.trajectories.sizes.declines import SIZE_DECLINES
from fineline_jax.trajectories.sizes.gaps import SIZE_GAPS
from fineline_jax.trajectories.sizes.passing import SIZE_CLOCKS
from fineline_jax.trajectories.statistics.columns import Statistic
from fineline_jax.trajectories.statistics.comparison import COMPARISON
from fineline_jax.trajectories.statistics.defects import DEFECTS, NOT_SCORED
from fineline_jax.trajectories.statistics.dynamics import DYNAMICS
from fineline_jax.trajectories.statistics.growth import GROWTH
from fineline_jax.trajectories.statistics.prediction import EFFECTS, VERDICTS
from fineline_jax.trajectories.statistics.scaling import SCALING
from fineline_jax.trajectories.statistics.similarity import SIMILARITY

STATISTICS: tuple[Statistic, ...] = (
    DYNAMICS, PRECEDENCE, CONCORDANCE, VERDICTS, EFFECTS, COMPARISON, ORDER_AGREEMENT, SIMILARITY, SIZE_GAPS,
    SIZE_CLOCKS, SCALING, DIPS, PHASE_QUALITY, EARLY_DECISIONS, DEFECTS,
)  # fmt: skip
"""In the order of the page; the first is what the timeline and the table of numbers show."""
ON_REQUEST: tuple[Statistic, ...] = (
    DIFFERENCES, TOKENS_TO, FINAL_MAP, FACET_COST, EARLY_SLOPES, LIVE_STATE, EVENT_CHANGES, ABILITY, DOCUMENTS,
    NOT_SCORED, SIZE_DECLINES, GROWTH,
)  # fmt: skip
"""Of several series, of options of `fineline analyze` and of what lies beside scores: no functions of every table."""
