"""The world's tasks: which domain each belongs to, and what guessing scores. Plain values."""

from pathlib import Path

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""Folder of the lm-eval task files shipped with the package; hand it to `lm_eval.tasks.TaskManager`."""

DATASET = "fineline/world"
"""`dataset_path` of the tasks; a benchmarks folder holds it as `fineline__world`."""

DOMAINS: dict[str, str] = {
    "world_word_order": "language",
    "world_agreement": "language",
    "world_agreement_distant": "language",
    "world_cloze": "reading",
    "world_tracking": "reading",
    "world_knowledge_common": "knowledge",
    "world_knowledge_rare": "knowledge",
    "world_physical": "commonsense",
    "world_size": "commonsense",
    "world_social": "commonsense",
    "world_comparison": "arithmetic",
    "world_counting": "arithmetic",
    "world_addition": "arithmetic",
    "world_remainder": "arithmetic",
    "world_two_hop_memory": "reasoning",
    "world_two_hop_context": "reasoning",
}
"""Domain of each task."""

CHANCE: dict[str, float] = {
    "world_word_order": 0.5,
    "world_agreement": 0.5,
    "world_agreement_distant": 0.5,
    "world_cloze": 0.0,  # the next word out of the whole vocabulary, as for LAMBADA
    "world_tracking": 0.25,
    "world_knowledge_common": 0.25,
    "world_knowledge_rare": 0.25,
    "world_physical": 0.25,
    "world_size": 0.5,
    "world_social": 0.5,
    "world_comparison": 0.5,
    "world_counting": 0.25,
    "world_addition": 0.25,
    "world_remainder": 0.25,
    "world_two_hop_memory": 0.25,
    "world_two_hop_context": 0.25,
}
"""Accuracy of guessing: one over the number of choices."""
