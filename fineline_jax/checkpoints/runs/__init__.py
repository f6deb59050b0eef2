"""The checkpoints of our own runs: Orbax with a record of digests."""
