"""OpenLLaMA 13B v1. No script was published; its step repositories run to 500,000, so batches of 2.1 M tokens."""

from fineline_jax.configs.open_llama_7b import open_llama  # pyright: ignore[reportMissingImports]
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Recipe


def recipe() -> Recipe:
    return open_llama(
        "open_llama_13b",
        "data/redpajama",
        ModelConfig(  # EasyLM llama_model.py, '13b'
            vocab_size=32_000,
            width=5_120,
            layers=40,
            heads=40,
            mlp_width=13_824,
            context=2_048,
            rope_theta=10_000.0,
            norm_eps=1e-6,
        ),
        batch=1_024,  # inferred: 2.1 M tokens per step
        steps=500_000,  # openlm-research/open_llama_13b_step_500000
        peak=3e-4,  # as the 7B run and LLaMA 13B (2302.13971, table 2)
    )
