"""Score checkpoint series from a checkout: python eval/score.py runs/llama_60m --suite core --out scores.

The same as `fineline score`, for clusters where every process starts a script.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fineline_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
