"""A 350 M Llama: GPT-3 Medium's depth and width (2005.14165, table 2.1), trained for 20 tokens per parameter."""

from fineline_jax.configs.llama_60m import llama  # pyright: ignore[reportMissingImports]
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Recipe


def recipe() -> Recipe:
    model = ModelConfig(vocab_size=32_000, width=1_024, layers=24, heads=16, mlp_width=2_736, context=2_048)
    # Batch: 0.5 M tokens, GPT-3 Medium's (2005.14165, table 2.1). Peak: ours, not tuned, between 60 M's and 1 B's.
    return llama("llama_350m", model, batch=256, peak=6e-4)
