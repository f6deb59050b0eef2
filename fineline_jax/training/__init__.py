"""From a recipe to a series of checkpoints."""
