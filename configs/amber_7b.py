"""LLM360 Amber 7B: the pretraining run behind the 360 released checkpoints, from its code and data card.

The public data fix the order of the 360 chunks, not the order inside a chunk, which depended on when the original
job was last started: this recipe reproduces the run at chunk granularity.
"""

from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Checkpoints, Compute, Data, Every, MeshShape, Optimizer, Recipe, Schedule, Source

CHUNKS = 360  # LLM360/AmberDatasets: train_000 ... train_359
CHUNK_WINDOWS = 1_706_976  # examples of 2,049 token ids per chunk (LLM360/AmberDatasets)
BATCH = 2_240  # 56 nodes x 4 GPUs x 10 sequences (amber-train run.sh)
LENGTH = 2_048  # amber-train main.py
STEPS_PER_CHUNK = CHUNK_WINDOWS // BATCH  # 762; amber-train drops the 96 examples left over
TOKENS_PER_STEP = BATCH * LENGTH  # 4,587,520


def recipe() -> Recipe:
    return Recipe(
        name="amber_7b",
        model=ModelConfig(  # HF LLM360/Amber config.json
            vocab_size=32_000,
            width=4_096,
            layers=32,
            heads=32,
            mlp_width=11_008,
            context=2_048,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            init_std=0.02,
        ),
        data=Data(sources=(Source("data/amber"),), sequence_length=LENGTH, order="chunks"),
        batch=Batch(sequences=BATCH),
        optimizer=Optimizer(  # torch AdamW in amber-train main.py
            schedule=Schedule(
                kind="cosine",
                peak=3e-4,
                final=3e-5,
                warmup_tokens=2_000 * TOKENS_PER_STEP,  # 2,000 optimizer steps
            ),
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,  # torch default
            weight_decay=0.1,
            decay="all",  # one parameter group
            clip_norm=1.0,
        ),
        tokens=CHUNKS * STEPS_PER_CHUNK * TOKENS_PER_STEP,  # 1,258,448,486,400 trained positions
        checkpoints=Checkpoints(
            initial=True,  # not released by LLM360; the start of every curve
            every=(Every(STEPS_PER_CHUNK * TOKENS_PER_STEP),),  # one per chunk: ckpt_000 ... ckpt_359
            latest_every_tokens=100 * TOKENS_PER_STEP,
        ),
        mesh=MeshShape(fsdp=-1),
        compute=Compute(dtype="bfloat16", remat="full"),  # bf16-mixed, activation checkpointing on every layer
        seed=11_111,  # amber-train seeds with 11111 + index of the last checkpoint + 1
    )
