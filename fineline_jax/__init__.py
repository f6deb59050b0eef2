"""How the abilities of a language model grow while it is pretrained."""

__version__ = "0.1.0"
