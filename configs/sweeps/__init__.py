"""Sweeps to read, copy and edit (`fineline ablate`)."""
