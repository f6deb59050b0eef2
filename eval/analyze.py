"""Write the report of scores from a checkout: python eval/analyze.py scores --out report.

The same as `fineline analyze`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fineline_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
