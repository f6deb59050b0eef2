"""What runs say of each other: facets, order of learning, quality of metrics, a run that still trains."""
