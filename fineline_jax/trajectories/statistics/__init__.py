"""What the curves say about each other. Each statistic is a function of a tidy table, with its columns described."""
