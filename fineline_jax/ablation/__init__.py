"""Many runs of one recipe with named changes: a sweep as a value, its plan, its runs and the table of their results.

What a file of one's own needs is here; nothing heavy is imported.
"""

from fineline_jax.ablation.branches import batch_branches, cooldowns
from fineline_jax.ablation.changes import changed
from fineline_jax.ablation.sweep import Arm, Branches, Sweep, crossed, grid, ladder

__all__ = ["Arm", "Branches", "Sweep", "batch_branches", "changed", "cooldowns", "crossed", "grid", "ladder"]
