"""What models of several sizes say of each other: gaps, tokens saved, clocks shifted from one size to the next."""
