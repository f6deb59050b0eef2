"""The released series known: entries in configs/series, and the rules that give steps and tokens."""
