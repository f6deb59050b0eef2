"""Scoring modes: how the same requests are encoded and compared. A mode is one value, in a file of its own."""
