"""The world's tasks: where their files are, and what is known of them. Plain values."""

from pathlib import Path

from fineline_jax.facts import tasks as facts
from fineline_jax.facts.tasks import Task

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""Folder of the lm-eval task files shipped with the package; hand it to `lm_eval.tasks.TaskManager`."""

DATASET = "fineline/world"
"""`dataset_path` of the tasks; a benchmarks folder holds it as `fineline__world`."""

TASKS: dict[str, Task] = {task.name: task for task in facts.TASKS if task.name.startswith("world_")}
"""What is known of each task, by domain, easiest first."""
