"""A 1.1 B Llama for one accelerator or a small pod: TinyLlama's shape, trained for 20 tokens per parameter."""

from fineline_jax.configs.llama_60m import llama  # pyright: ignore[reportMissingImports]
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Recipe


def recipe() -> Recipe:
    model = ModelConfig(  # TinyLlama 1.1B (jzhang38/TinyLlama)
        vocab_size=32_000, width=2_048, layers=22, heads=32, kv_heads=4, mlp_width=5_632, context=2_048
    )
    return llama("llama_1b", model, batch=512, peak=4e-4)  # TinyLlama's peak rate, half its batch of 2 M tokens
