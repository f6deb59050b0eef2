"""A simulated series of scores with known dynamics, for tests of the trajectories room and for looking at reports."""

import numpy as np
import pandas as pd

# (domain, task, chance, end score, tokens of the middle of the rise, slope in 1/nats of tokens, documents)
WORLD = (
    ("word order", "adjective_order", 0.5, 0.97, 2.2e5, 1.8, 600),
    ("word order", "subject_verb_agreement", 0.5, 0.93, 4.0e5, 1.6, 600),
    ("facts", "frequent_facts", 0.25, 0.92, 9.0e5, 1.7, 500),
    ("facts", "rare_facts", 0.25, 0.55, 3.2e6, 1.9, 500),
    ("common sense", "object_affordance", 0.5, 0.86, 1.1e6, 1.5, 500),
    ("common sense", "social_rules", 0.25, 0.71, 1.9e6, 1.6, 500),
    ("arithmetic", "addition", 0.25, 0.62, 4.5e6, 3.0, 400),
    ("arithmetic", "subtraction", 0.25, 0.44, 7.0e6, 3.0, 400),
    ("two-hop", "two_hop_family", 0.25, 0.36, 9.0e6, 2.5, 400),
    ("two-hop", "two_hop_location", 0.25, 0.25, 1.0e7, 1.0, 400),
)


def simulated_table(seed: int = 0, series: str = "demo", checkpoints: int = 16, speed: float = 1.0) -> pd.DataFrame:
    """Accuracy (binomial), correct-choice probability and bits per byte of every task at log-spaced checkpoints."""
    rng = np.random.default_rng(seed)
    steps = np.unique(np.concatenate([[0], np.geomspace(8, 3000, checkpoints - 1)]).astype(int))
    tokens = steps * 4096
    rows = []
    for domain, task, chance, end, middle, slope, n in WORLD:
        rise = 1 / (1 + np.exp(-slope * np.log(np.maximum(tokens, 1) * speed / middle)))
        score = chance + (end - chance) * rise
        for step, at, p in zip(steps, tokens, score, strict=True):
            acc = rng.binomial(n, p) / n
            key = {
                "series": series,
                "checkpoint": f"step_{step}",
                "step": step,
                "tokens": at,
                "domain": domain,
                "task": task,
            }
            soft = chance + (p - chance) * 0.8 + rng.normal(0, 0.006)
            bits = 3.2 - 2.2 * (p - chance) / 0.75 + rng.normal(0, 0.01)
            rows += [
                key
                | {
                    "metric": "acc",
                    "value": acc,
                    "stderr": np.sqrt(acc * (1 - acc) / (n - 1)),
                    "n": n,
                    "chance": chance,
                },
                key | {"metric": "choice_prob", "value": soft, "stderr": 0.009, "n": n, "chance": chance},
                key | {"metric": "bits_per_byte", "value": bits, "stderr": 0.02, "n": n, "chance": np.nan},
            ]
    return pd.DataFrame(rows)


def simulated_losses(steps: int = 3000) -> pd.DataFrame:
    """A log as a run writes it: a power law with noise under a warmup-cosine schedule, validation now and then."""
    rng = np.random.default_rng(1)
    step = np.arange(1, steps + 1)
    loss = 1.4 + 5.2 * (1 + step / 12) ** -0.55 + rng.normal(0, 0.03, steps)
    rate = 3e-3 * np.minimum(step / 100, 0.1 + 0.45 * (1 + np.cos(np.pi * step / steps)))
    validation = np.where(np.isin(step, np.geomspace(8, steps, 12).astype(int)), loss + 0.05, np.nan)
    return pd.DataFrame(
        {
            "step": step,
            "tokens": step * 4096,
            "loss": loss,
            "learning_rate": rate,
            "validation_loss/held_out": validation,
        }
    )
