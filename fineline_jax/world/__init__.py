"""The synthetic world of the demo: a corpus and held-out tasks, from a seed."""
