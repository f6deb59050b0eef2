"""Settings of hypothesis for properties whose every example compiles a program.

No shrinking: it would compile for many minutes before the failure is told. Derandomized: the same examples each time,
so each branch that a test claims is also given as an `@example`.
"""

from hypothesis import Phase, settings

COMPILES = settings(
    deadline=None, derandomize=True, print_blob=False, phases=(Phase.explicit, Phase.generate), max_examples=8
)
