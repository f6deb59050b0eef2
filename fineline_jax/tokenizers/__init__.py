"""The one room that opens a tokenizer: its files, its special tokens, its hash, and where a text may be cut."""
