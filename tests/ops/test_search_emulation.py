"""The tests of searches' ops once more, on their CUDA kernels without a GPU.

As in test_cuda_emulation.py the kernels run thread by thread, in an order that is shuffled: a row
that is overwritten before it has been read shows. They stand in for the native CPU kernels.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from cases import Backend
from crossfade.ops import fork_cache_, native
from emulation import build
from test_chunk_select import (  # noqa: F401
    test_a_finished_row_is_one_candidate,
    test_all_finished,
    test_any_scores,
    test_infinities_and_nan,
    test_one_row_or_one_sample,
    test_sizes,
    test_ties_go_to_the_lower_slot,
)
from test_fork_cache import (  # noqa: F401
    bits,
    cache,
    expected,
    test_a_number_and_a_tensor,
    test_any_fork,
    test_dims,
    test_more_tensors_than_a_launch_takes,
    test_numbers_of_rows,
    test_parents,
    test_parents_and_a_range_of_each_row,
    test_positions_of_tensors_are_clamped,
    test_ranges,
    test_strides,
    test_tensors_of_all_kinds,
    test_the_most_rows_on_a_gpu,
    test_unaligned_views,
)

# ---- csrc/crossfade.h in ctypes ------------------------------------------------------------------


class Selection(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("prompts", "slots", "width")),
        *((name, ctypes.c_void_p) for name in ("scores", "finished", "parents")),
    )


class Cache(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("heads", "length", "size")),
        ("item_bytes", ctypes.c_int32),
    )


class PerRow(ctypes.Structure):
    _fields_ = (("rows", ctypes.c_void_p), ("all", ctypes.c_int64))


class Fork(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("caches", ctypes.POINTER(Cache)),
        ("count", ctypes.c_int64),
        ("parents", ctypes.c_void_p),
        ("start", PerRow),
        ("end", PerRow),
    )


class Emulated:
    """`crossfade._native` with the CUDA kernels in the place of the CPU's."""

    def __init__(self, library: Any) -> None:
        self.library, self.order = library, 0

    def _run(self, name: str, struct: ctypes.Structure) -> None:
        self.order += 1
        self.library.shuffle_threads(self.order)
        error = getattr(self.library, name)(ctypes.byref(struct))
        if error is not None:
            raise RuntimeError(error.decode())

    def chunk_select_cpu(self, selection: tuple[int, ...]) -> None:
        self._run("emulated_chunk_select", Selection(*selection))

    def fork_cache_cpu(self, fork: tuple[Any, ...], caches: list[Any], threads: int) -> None:
        rows, parents, *positions = fork
        start, end = (PerRow(*x) if isinstance(x, list) else PerRow(None, x) for x in positions)
        array = (Cache * len(caches))(
            *(Cache(data, strides[:3], *rest) for data, strides, *rest in caches)
        )
        self._run("emulated_fork_cache", Fork(rows, array, len(caches), parents, start, end))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    loaded: Any = build("search.cpp", tmp_path_factory.mktemp("search_emulation"))
    for name in ("emulated_chunk_select", "emulated_fork_cache"):
        getattr(loaded, name).restype = ctypes.c_char_p
    for name, struct in (("selection", Selection), ("cache", Cache), ("fork", Fork)):
        assert getattr(loaded, f"{name}_bytes")() == ctypes.sizeof(struct)
    return loaded


@pytest.fixture
def backend(library: Any, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(native, "_native", Emulated(library))
    return Backend("native", "cpu")


# ---- What is CUDA's own --------------------------------------------------------------------------


def test_parents_out_of_range_leave_their_rows_alone(backend: Backend) -> None:
    x = cache(4, 2, 5, 8)
    want = expected(x, [1, -1, -1, 0], 0, None)
    fork_cache_([x], torch.tensor([1, 4, -(2**40), 0]), backend=backend.name)
    assert torch.equal(bits(x), bits(want))


def test_too_many_rows(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match="at most 2,048 rows"):
        fork_cache_([torch.zeros(2049, 1, 1, 4)], torch.zeros(2049).long(), backend=backend.name)
