"""Train a recipe from a checkout: python train/pretrain.py amber_7b [--run DIR] [--field.sub value ...].

The same as `fineline pretrain`, for clusters where every process starts a script. On more than one host add
--distributed: Cloud TPU pods, SLURM and MPI are detected.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fineline_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
