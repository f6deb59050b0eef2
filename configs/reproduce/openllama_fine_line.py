"""OpenLLaMA 7B v2 as the authors of The Fine Line trained it again: m-a-p/OpenLLaMA-Reproduce-*, arXiv 2404.01204.

From the model card of 973.08B: v2's mixture, batches of 4 M tokens, 3e-4 to 3e-5, "closely follows Llama2". The names
lie on a grid of 4000 steps up to 1933.57 B; the end of the schedule is not published and taken to be Llama 2's 2 T.
"""

import dataclasses

from fineline_jax.configs.open_llama_7b import TOKENS_PER_STEP  # pyright: ignore[reportMissingImports]
from fineline_jax.configs.open_llama_7b_v2 import recipe as version_2  # pyright: ignore[reportMissingImports]
from fineline_jax.recipe import Checkpoints, Every, Recipe

GRID = 4_000 * TOKENS_PER_STEP


def recipe() -> Recipe:
    kept = Checkpoints(
        every=(Every(GRID),),
        at_tokens=(461_000 * TOKENS_PER_STEP,),  # 1933.57 B, the one name off the grid
        latest_every_tokens=100 * TOKENS_PER_STEP,
    )
    tokens = 2_000_000_000_000 // TOKENS_PER_STEP * TOKENS_PER_STEP
    return dataclasses.replace(version_2(), name="openllama_fine_line", tokens=tokens, checkpoints=kept)
