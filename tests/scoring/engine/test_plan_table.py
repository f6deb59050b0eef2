"""What `fineline tasks plan` prints: each task planned by itself."""

import numpy as np

from fineline_jax.scoring.engine.plan_table import taken
from fineline_jax.scoring.requests import pack


def test_rows_of_a_ragged_array_are_taken_in_the_order_asked():
    ragged = pack.Ragged(np.arange(6), np.array([0, 2, 2, 6]))
    some = taken(ragged, np.array([2, 1, 0]))
    assert [some[i].tolist() for i in range(3)] == [[2, 3, 4, 5], [], [0, 1]]
