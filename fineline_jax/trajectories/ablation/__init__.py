"""What an ablation says: statistics of arms and seeds, each a function of tables, with its columns described."""
