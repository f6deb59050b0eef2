"""Checkpoint series: our own Orbax steps and weights released by others."""
