"""A Llama in numpy's float64."""

import jax
import numpy as np
import scipy.special

from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.engine import step

CONTEXT, BOS = 24, 5


VOCABULARY = 3 * step.CPU_BLOCK + 1


CONFIG = ModelConfig(
    vocab_size=VOCABULARY, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, context=CONTEXT, norm_eps=1e-2
)


def logits_of(params: dict, tokens: list[int], config: ModelConfig = CONFIG) -> np.ndarray:
    """[length, vocabulary] in float64 (2302.13971: RMSNorm, rotary positions in halves, SwiGLU, grouped queries)."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale
    half, length = config.head_dim // 2, len(tokens)
    angle = np.arange(length)[:, None] * config.rope_theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    turn = lambda x: np.concatenate(
        [x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1
    )
    x = p["embed"][tokens]
    for i in range(config.layers):
        w = {name: leaf[i] for name, leaf in p["layers"].items()}
        y = norm(x, w["attention_norm"])
        q, k, v = (np.einsum("sd,dhk->shk", y, w[name]) for name in "qkv")
        q, k = turn(q), turn(k)
        mixed = np.empty_like(q)
        for head in range(config.heads):
            of_group = head // (config.heads // config.kv_heads)
            scores = q[:, head] @ k[:, of_group].T / np.sqrt(config.head_dim)
            scores[~np.tri(length, dtype=bool)] = -np.inf
            mixed[:, head] = scipy.special.softmax(scores, axis=1) @ v[:, of_group]
        x = x + np.einsum("shk,hkd->sd", mixed, w["o"])
        y = norm(x, w["mlp_norm"])
        gate = y @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
    return norm(x, p["norm"]) @ p["head"]
