"""OpenLLaMA 7B v1: EasyLM's examples/pretrain_llama_7b.sh, the run on a TPU v4-512.

The data are RedPajama-1T with the OpenLLaMA v1 tokenizer (BOS before and EOS after each document). One difference is
known: EasyLM averages the loss over each sequence and then over the batch, here every trained target weighs the same;
the two differ by the few masked BOS.
"""

from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import (
    Batch,
    Checkpoints,
    Compute,
    Data,
    Every,
    Loss,
    MeshShape,
    Optimizer,
    Recipe,
    Schedule,
    Source,
)

BATCH = 2_048  # --train_dataset.json_dataset.batch_size
LENGTH = 2_048  # --train_dataset.json_dataset.seq_length
TOKENS_PER_STEP = BATCH * LENGTH  # 4,194,304
STEPS = 250_000  # --total_steps: 1.0486 T tokens


def recipe() -> Recipe:
    return open_llama(
        "open_llama_7b",
        "data/redpajama",
        ModelConfig(  # EasyLM llama_model.py, '7b'
            vocab_size=32_000,
            width=4_096,
            layers=32,
            heads=32,
            mlp_width=11_008,
            context=2_048,
            rope_theta=10_000.0,
            norm_eps=1e-6,
        ),
    )


def open_llama(
    name: str, data: str, model: ModelConfig, batch: int = BATCH, steps: int = STEPS, peak: float = 3e-4
) -> Recipe:
    """The OpenLLaMA recipe; the sizes differ in the model, the batch and the number of steps."""
    tokens_per_step = batch * LENGTH
    return Recipe(
        name=name,
        model=model,
        data=Data(sources=(Source(data),), sequence_length=LENGTH),
        batch=Batch(sequences=batch),
        optimizer=Optimizer(  # EasyLM optimizers.py, AdamWOptimizerFactory
            schedule=Schedule(
                kind="cosine",
                peak=peak,  # --optimizer.adamw_optimizer.lr
                final=peak / 10,  # --optimizer.adamw_optimizer.end_lr=3e-5
                warmup_tokens=2_000 * tokens_per_step,  # --optimizer.adamw_optimizer.lr_warmup_steps, inside the total
            ),
            beta1=0.9,  # default of the factory, not set by the script
            beta2=0.95,  # default of the factory
            eps=1e-8,  # optax default
            weight_decay=0.1,  # --optimizer.adamw_optimizer.weight_decay
            decay="all",  # get_weight_decay_exclusions() is empty
            clip_norm=1.0,  # default of the factory
        ),
        tokens=steps * tokens_per_step,  # --total_steps
        loss=Loss(ignore_token=1),  # EasyLM data.py masks the BOS target
        checkpoints=Checkpoints(
            initial=True,
            every=(Every(steps // 100 * tokens_per_step),),  # --save_milestone_freq=2500 of 250,000
            latest_every_tokens=100 * tokens_per_step,
        ),
        mesh=MeshShape(replica=-1, fsdp=64),  # --mesh_dim='-1,64,1'
        # --dtype fp32 is what the script says; on TPU its products are bfloat16 passes at default precision.
        compute=Compute(dtype="float32", remat="full"),
        seed=42,  # EasyLM llama_train.py
    )
