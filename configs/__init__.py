"""Recipes, suites and series to read, copy and edit."""
