"""Copying into parameters: whatever lies in the file, in whatever order, arrives bit by bit."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineline_jax.checkpoints.formats import host_copy
from fineline_jax.checkpoints.formats.host_copy import copy, in_threads, new_array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64), BFLOAT16]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_copy_is_numpy_s_assignment(data: st.DataObject) -> None:
    """Any order of axes, gaps in the file, any pair of dtypes, many tiles; around the target nothing changes."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4), label="shape")
    order = data.draw(st.permutations(range(len(shape))), label="order of the axes in the file")
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=len(shape), max_size=len(shape)), label="gaps in the file")
    stored, wanted = (data.draw(st.sampled_from(FLOATS), label=side) for side in ("file", "parameter"))
    lying = [shape[axis] + gap for axis, gap in zip(order, gaps)]
    file = (1e3 * np.random.default_rng(len(shape)).standard_normal(lying)).astype(stored)
    source = file.transpose(np.argsort(order))[tuple(slice(size) for size in shape)]
    parameter, expected = (new_array([size + 1 for size in shape], wanted) for _ in range(2))
    inside = tuple(slice(1, None) for _ in shape)
    expected[inside] = source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copy, "RUN", 3)
        patch.setattr(host_copy, "ROWS", 5)
        copy(parameter[inside], source)
    assert parameter.tobytes() == expected.tobytes()


@pytest.mark.parametrize("wanted", [BFLOAT16, np.dtype(np.float32)], ids=str)
def test_every_bfloat16_there_is_arrives(wanted: np.dtype) -> None:
    """Infinities, subnormals and the payloads of NaNs too; transposed, as weights are, in tiles of the true size."""
    every = np.arange(1 << 16, dtype=np.uint16).view(BFLOAT16)
    source = np.tile(every, 9).reshape(768, 768).T
    target = new_array(source.shape, wanted)
    copy(target, source)
    assert target.tobytes() == source.astype(wanted).tobytes()


def test_a_number_beyond_float16_becomes_infinite_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    target = new_array([3], np.dtype(np.float16))
    copy(target, np.array([1e6, -1e6, np.nan], np.float32))
    assert target[:2].tolist() == [np.inf, -np.inf] and np.isnan(target[2]) and not recwarn.list


@pytest.mark.parametrize("size", [10, host_copy.LARGE // 4, host_copy.PIECE + 3])
def test_new_arrays_are_zeros_that_jax_can_take(size: int) -> None:
    arrays = [new_array([size], np.dtype(np.float32)) for _ in range(20)]  # not all where the system begins at 64
    assert all(array.ctypes.data % 64 == 0 and array.flags.writeable and not array.any() for array in arrays)


def test_what_fails_in_a_thread_is_raised() -> None:
    done = []
    in_threads(lambda a, b: done.append(a + b), [1, 2, 3], [10, 20, 30])
    assert sorted(done) == [11, 22, 33]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda value: 1 // value, [1, 0, 2])
