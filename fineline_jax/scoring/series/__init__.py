"""Scoring a series: the loop over checkpoints, opening the next one meanwhile, watching a run, scoring in training."""
