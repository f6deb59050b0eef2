"""What a fresh process has loaded."""

import subprocess
import sys

HEAVY = {"jax", "flax", "transformers", "lm_eval", "tensorflow_datasets", "pandas", "torch"}


def modules_after(program: str) -> set[str]:
    """The outermost packages that a fresh process has loaded after running `program`."""
    tell = "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program + tell], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())
