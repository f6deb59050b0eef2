"""Both ways to lm-eval: our engine as its model, our scores as its files."""
