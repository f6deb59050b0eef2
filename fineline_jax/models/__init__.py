"""The one decoder, its attention implementations and its configuration."""
