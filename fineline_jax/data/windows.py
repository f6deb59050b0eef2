"""Documents laid end to end and cut into windows of equal length.

A window has `sequence_length + 1` tokens: inputs are its first, targets its last `sequence_length`. Windows
follow each other without overlap and wrap across documents, as in Amber (LLM360/amber-data-prep) and
OpenLLaMA (EasyLM data.py). What does not fill the last window is dropped and counted.
"""

from collections.abc import Sequence

import numpy as np


class WindowCutter:
    """Takes token runs, gives back full windows, keeps the rest for the next run."""

    def __init__(self, window_tokens: int) -> None:
        self.window_tokens = window_tokens
        self.tokens = 0
        """Tokens taken so far, the kept rest included."""
        self._rest = np.empty(0, np.int32)

    @property
    def dropped(self) -> int:
        """Tokens that fill no window, if nothing follows."""
        return len(self._rest)

    def cut(self, runs: Sequence[np.ndarray]) -> np.ndarray:
        """Append runs of ids, each int32 [any]; return what became full, int32 [n, window_tokens]."""
        stream = np.concatenate([self._rest, *runs])
        full = len(stream) // self.window_tokens * self.window_tokens
        self.tokens += len(stream) - len(self._rest)
        self._rest = stream[full:].copy()
        return stream[:full].reshape(-1, self.window_tokens)


def with_markers(ids: Sequence[int] | np.ndarray, bos_id: int | None, eos_id: int | None) -> np.ndarray:
    """One document's ids, int32, with BOS before and EOS after where an id is given."""
    before = [] if bos_id is None else [bos_id]
    after = [] if eos_id is None else [eos_id]
    return np.concatenate([before, ids, after], dtype=np.int32, casting="unsafe")  # an empty list is of floats
