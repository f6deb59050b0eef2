"""The demo's embedded world: text written from a seed, held-out questions about it, and its tokenizer.

`fineline_jax.world.generate.generate` writes everything; `fineline_jax.world.catalogue` names the tasks.
"""
