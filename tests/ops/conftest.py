"""One fixture runs the tests of the ops on every backend that works on this machine."""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("cases")

from cases import Backend  # noqa: E402
from crossfade.ops.backends import why_not  # noqa: E402
from emulated_cuda import EmulatedCuda, load_blends  # noqa: E402

KERNELS = [Backend("native", "cpu")]
if torch.cuda.is_available():
    KERNELS += [Backend("native", "cuda:0"), Backend("triton", "cuda:0")]
else:
    KERNELS += [Backend("triton", "cpu")]
EVERY = [Backend("reference", "cpu"), *KERNELS]


@pytest.fixture(scope="session", autouse=importlib.util.find_spec("triton") is not None)
def _patch_once() -> Iterator[None]:
    """Have Triton's interpreter patch its language once a launch, not at each call in a kernel.

    A device function that is called within a launch finds the language patched. To patch it once
    more changes nothing, and would take half of the interpreter's time.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_unless_done(function: Any) -> Any:
        seen = [x for x in function.__globals__.values() if x is language or x is language.core]
        if any(language.core.is_builtin(module.load) for module in seen):
            return patch(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as m:
        m.setattr(interpreter, "_patch_lang", patch_unless_done)
        yield


def _usable(backend: Backend) -> Iterator[Backend]:
    reason = why_not(backend.name, torch.device(backend.device))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    if backend.interpreted:  # numpy computes what a GPU would, and warns of NaN and infinities
        with np.errstate(all="ignore"):
            yield backend
    else:
        yield backend


@pytest.fixture(scope="session", params=EVERY, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend, the reference too: for tests against a truth from elsewhere."""
    yield from _usable(request.param)


@pytest.fixture(scope="session", params=KERNELS, ids=str)
def kernel(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend but the reference: for tests against the reference."""
    yield from _usable(request.param)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CUDA kernels of blends, compiled for the CPU: for an `EmulatedCuda`."""
    return load_blends(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture(scope="session", params=[*EVERY, (1, 64), (4, 32)], ids=str)
def blender(request: pytest.FixtureRequest) -> Iterator[Backend | EmulatedCuda]:
    """Every backend, and the CUDA kernels on the CPU by a block of 64 threads and by 4 of 32."""
    if isinstance(request.param, Backend):
        yield from _usable(request.param)
    else:
        yield EmulatedCuda(request.getfixturevalue("library"), *request.param)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of long tables CI has Triton's interpreter run every seventh case: 30 to 60 ms a row."""
    seen: Counter[str] = Counter()
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("kernel") or (item.path.stem == "test_rows" and params.get("backend"))
        if (
            isinstance(backend, Backend)
            and backend.interpreted
            and not item.get_closest_marker("sweep")
        ):
            test, _, _ = item.nodeid.partition("[")
            if seen[test] % 7:
                item.add_marker("sweep")
            seen[test] += 1
