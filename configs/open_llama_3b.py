"""OpenLLaMA 3B v1. No script was published; step repositories up to 500,000 for the 13B run imply half batches."""

from fineline_jax.configs.open_llama_7b import open_llama  # pyright: ignore[reportMissingImports]
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Recipe


def recipe() -> Recipe:
    return open_llama(
        "open_llama_3b",
        "data/redpajama",
        ModelConfig(  # EasyLM llama_model.py, '3b'
            vocab_size=32_000,
            width=3_200,
            layers=26,
            heads=32,
            mlp_width=8_640,
            context=2_048,
            rope_theta=10_000.0,
            norm_eps=1e-6,
        ),
        batch=1_024,  # inferred: 2.1 M tokens per step
        steps=500_000,  # inferred: 1.05 T tokens
    )
