"""Corpora as TFDS data sets, and the batch of a step as a pure function of the step."""
