"""Recipes, suites and sweeps to read, copy and edit."""
