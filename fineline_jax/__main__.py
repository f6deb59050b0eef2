"""`python -m fineline_jax`: the command `fineline`."""

import sys

from fineline_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
