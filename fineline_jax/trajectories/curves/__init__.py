"""One curve, a score over training tokens: its fit, its noise, and tests of whether it moves."""
