"""Log-likelihoods of all requests under a model: prefix-tree rows, and plain rows as the reference."""
