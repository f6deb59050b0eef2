"""A 58 M Llama, trained for 20 tokens per parameter (2203.15556): the smallest of the ladder 60 M, 350 M, 1 B."""

from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Checkpoints, Compute, Data, Every, Optimizer, Recipe, Schedule, Source

LENGTH = 2_048
TOKENS_PER_PARAMETER = 20  # 2203.15556, table 3


def recipe() -> Recipe:
    # Ours, in Llama's proportions (2302.13971): heads of 64, a SwiGLU of 8/3 widths, rounded up.
    model = ModelConfig(vocab_size=32_000, width=512, layers=8, heads=8, mlp_width=1_376, context=2_048)
    return llama("llama_60m", model, batch=128, peak=1e-3)  # ours, not tuned: a quarter of a million tokens per step


def llama(name: str, model: ModelConfig, batch: int, peak: float) -> Recipe:
    """A compute-optimal run with OpenLLaMA's optimizer and its decay to a tenth of the peak.

    The warmup of 1 % of the run and the checkpoints, every 1 % until 10 % and every 10 % from there, are ours.
    """
    tokens_per_step = batch * LENGTH
    steps = TOKENS_PER_PARAMETER * model.parameters // tokens_per_step
    tokens = steps * tokens_per_step
    dense = steps // 100 * tokens_per_step  # 1 % of the run
    return Recipe(
        name=name,
        model=model,
        data=Data(sources=(Source("data/redpajama"),), sequence_length=LENGTH),
        batch=Batch(sequences=batch),
        optimizer=Optimizer(schedule=Schedule(peak=peak, final=peak / 10, warmup_tokens=dense)),
        tokens=tokens,
        checkpoints=Checkpoints(
            initial=True,
            every=(Every(dense, until=10 * dense), Every(10 * dense)),  # dense early, sparse late
            latest_every_tokens=dense,
        ),
        compute=Compute(dtype="bfloat16", remat="context"),
    )
