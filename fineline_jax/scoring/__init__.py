"""Request packs, the scorer, and the scores it leaves behind."""
