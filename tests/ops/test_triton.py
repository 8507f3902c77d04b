"""What is Triton's own: the kernels' parts in isolation, and that they compile for GPUs.

The interpreter hides wrong types and recompilation; compiling needs no GPU, so it is tested
everywhere: this file, run as a program, compiles what the launchers launch.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from cases import Backend, Problem, assert_samples_agree, structs  # noqa: E402
from crossfade import ops  # noqa: E402
from crossfade.kernels import noise, terms, threshold  # noqa: E402
from crossfade.ops import BlendSample, Draw, Inputs, Part, Support, reference  # noqa: E402
from crossfade.ops import triton as backend  # noqa: E402
from crossfade.ops.attention import Attention  # noqa: E402
from crossfade.ops.logp import tiles as logp_tiles  # noqa: E402
from crossfade.ops.triton import blending as launchers  # noqa: E402
from crossfade.ops.triton import logp as logp_launchers  # noqa: E402
from sweeps import every, product  # noqa: E402
from torch import Tensor  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


def blend_sample(*args: Any, **options: Any) -> BlendSample:
    """`ops.blend_sample` of this backend, where it compiles without a GPU too."""
    return backend.blend_sample(*structs(*args, **options))


def blend(*args: Any, **options: Any) -> Tensor:
    return backend.blend(Inputs(*args, **options))


@triton.jit
def apply_kernel(out, x, F: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, F(tl.load(x + at)))


def apply(function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """A kernel's elementwise part on [N]."""
    size = 1 << (len(x) - 1).bit_length()
    x = torch.cat([x, x[:1].expand(size - len(x))]).to(DEVICE)
    out = torch.empty(size, dtype=dtype, device=DEVICE)
    apply_kernel[1,](out, x, function, size)
    return out.cpu()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def words(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(torch.uint32)


# ---- Noise ---------------------------------------------------------------------------------------


@triton.jit
def philox_kernel(out, x):
    zero = tl.zeros([1], tl.uint32)
    c0, c1, c2, c3 = tl.load(x), tl.load(x + 1), tl.load(x + 2), tl.load(x + 3)
    w0, w1, w2, w3 = noise.philox(
        zero + c0, zero + c1, zero + c2, zero + c3, tl.load(x + 4), tl.load(x + 5)
    )
    one = tl.arange(0, 1)
    tl.store(out + one, w0)
    tl.store(out + 1 + one, w1)
    tl.store(out + 2 + one, w2)
    tl.store(out + 3 + one, w3)


@pytest.mark.parametrize(
    ("counter_and_key", "expected"),
    [  # the known answers of Random123's philox4x32-10
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter_and_key, expected):
    out = torch.empty(4, dtype=torch.uint32, device=DEVICE)
    philox_kernel[1,](out, words(*counter_and_key).to(DEVICE))
    assert out.tolist() == expected


def test_gumbel_is_exact_at_both_ends():
    """Near u = 1 the plain formula is infinite; near u = 0 the other branch would lose digits."""
    ends = [0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 3, 2**32 - 2, 2**32 - 1]
    h = torch.cat([torch.tensor(ends), torch.arange(12345, 2**32, 2**22 + 1)])
    x = (h.double() + 0.5) / 2**32
    e = torch.where(x <= 0.5, -x.log(), -torch.log1p(-(2**32 - 1 - h.double() + 0.5) / 2**32))
    ours = apply(noise.gumbel, words(*h.tolist()), torch.float32)[: len(h)].double()
    torch.testing.assert_close(ours, -e.log(), rtol=2e-7, atol=2e-7)
    assert ours.max() == ours[8]
    assert 22.87 < ours[8] < 22.88


def test_gumbel_of_every_word_near_one_is_finite_and_ordered():
    h = torch.arange(2**32 - 1024, 2**32)
    ours = apply(noise.gumbel, words(*h.tolist()), torch.float32)
    assert ours.isfinite().all()
    assert (ours.diff() >= 0).all()


def test_log1m_and_expm1_keep_relative_precision():
    y = torch.cat([torch.logspace(-30, math.log10(0.5), 500), torch.tensor([0.0, 0.5])])
    ours = apply(noise.log1m, y, torch.float32)[: len(y)].double()
    torch.testing.assert_close(ours, torch.log1p(-y.double()), rtol=5e-7, atol=0.0)
    x = -torch.cat([torch.logspace(-30, 2, 500), torch.tensor([0.0, INF])])
    ours = apply(terms.expm1_of_negative, x, torch.float32)[: len(x)].double()
    torch.testing.assert_close(ours, torch.expm1(x.double()), rtol=5e-7, atol=0.0)


# ---- Threshold -----------------------------------------------------------------------------------


def test_keys_sort_as_floats_do_and_convert_back():
    tiny = torch.finfo(torch.float32).smallest_normal
    x = torch.tensor([-INF, -3e38, -1.0, -tiny, -0.0, 0.0, tiny, 1.0, 1.0000001, 3e38, INF])
    keys = apply(threshold.key_of, x, torch.int32)[: len(x)]
    assert ((keys.diff() > 0) == (x.diff() > 0)).all()  # zeros of both signs share a key
    assert keys[0] == threshold.LOWEST_KEY.value
    assert apply(threshold.float_of_key, keys, torch.float32)[: len(x)].tolist() == x.tolist()


@triton.jit
def truncation_kernel(
    out, x, vocab, tops, listed, groups, temperature, settings,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    top = tl.load(x)
    k = tl.load(settings).to(tl.int32)
    p, m = tl.load(settings + 1), tl.load(settings + 2)
    t = tl.load(temperature)
    tl.store(
        out,
        threshold.truncation(x, vocab, tops, listed, groups, top, t, k, p, m, GROUP, BLOCK, CHUNK),
    )


NORMAL = 3 * normal(1000)
ROWS = {
    "normal": NORMAL,
    "bfloat16": NORMAL.bfloat16().float(),  # many ties
    "integers": NORMAL.round(),
    "equal": torch.full((77,), -2.5),
    "one": torch.tensor([1.25]),
    "huge": NORMAL * 1e4,
    "spread": torch.logspace(-38, 38, 300) * torch.tensor([1.0, -1.0]).repeat(150),
    "all digits": torch.arange(300, dtype=torch.int32).view(torch.float32) + 1.0,
    "next to one": (torch.arange(300, dtype=torch.int32) + 0x3F800000).view(torch.float32),
    "removed": torch.where(NORMAL > 1, NORMAL, -INF),
}


CUTS = [
    (1, 1, 0),
    (50, 1, 0),
    (0, 0.9, 0),
    (0, 0, 0),
    (300, 0.3, 0),
    (0, 1, 0.05),
    (40, 0.95, 0.02),
]


@pytest.mark.parametrize(("row", "cut"), product(list(ROWS), CUTS, together=1), ids=str)
def test_threshold_keeps_what_a_sort_keeps(row, cut):
    """Of groups of 16 tokens: top-k is below and above their number."""
    group = 16
    order = torch.randperm(len(ROWS[row]) - 1, generator=torch.Generator().manual_seed(0))
    x = ROWS[row].sort(descending=True).values  # the kernel takes the maximum from the first
    x = torch.cat([x[:1], x[1:][order]])
    temperature = 1.5
    settings = torch.tensor(cut, dtype=torch.float32)
    out = torch.empty(1, device=DEVICE)
    groups = -(-len(x) // group)
    tops = torch.nn.functional.pad(x, (0, groups * group - len(x)), value=-INF)
    tops = tops.unflatten(0, (groups, group)).amax(dim=1).to(DEVICE)
    listed = torch.empty(groups, dtype=torch.int32, device=DEVICE)
    t = torch.tensor([temperature], device=DEVICE)
    truncation_kernel[1,](
        out, x.to(DEVICE), len(x), tops, listed, groups, t, settings.to(DEVICE), group, 512, 64
    )
    kept = (x >= out.cpu()) & (x > -INF)
    one = [torch.tensor([s]) for s in cut]
    expected = reference.keep(x.double()[None] / temperature, *one)[0] & (x > -INF)
    assert kept.sum() == expected.sum()
    assert (kept == expected).all()


# ---- Tiles ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _as_on_a_gpu() -> Iterator[None]:
    """The interpreter computes by NumPy, which warns of infinities and NaN."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=["tiles of 256", "tiles of 1024", "little at once"])
def tiles(request, monkeypatch):
    block = 1024 if request.param == "tiles of 1024" else 256
    monkeypatch.setattr(launchers, "tile_size", lambda rows, vocab: (block, 4))
    if request.param == "little at once":  # as of a vocabulary of a billion
        monkeypatch.setattr(launchers, "MOST_AT_ONCE", 4)
        monkeypatch.setattr(launchers, "MOST_PROGRAMS", 2)


@pytest.mark.parametrize("vocab", every(2, [1, 255, 256, 257, 1025]))
@pytest.mark.usefixtures("tiles")
def test_results_do_not_depend_on_the_tiles(vocab):
    """One tile, a full one, and one with a single token in it all agree with the reference."""
    z = list(normal(2, 2, vocab))
    on_device = [x.to(DEVICE) for x in z]
    options = {"seed": 3, "step": 5, "temperature": 0.8}
    options |= {"return_term_logprobs": True, "return_pushes": True}
    for settings in ({}, {"top_k": 7, "top_p": 0.8}, {"do_sample": False}):
        ours = blend_sample(on_device, (1.0, 0.5), **options, **settings)
        truth = ops.blend_sample(z, (1.0, 0.5), **options, **settings, backend="reference")
        for x, y in zip(ours, truth, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=0, atol=2e-5)
    log_p = blend(on_device, (1.0, 0.5)).cpu()
    torch.testing.assert_close(
        log_p, ops.blend(z, (1.0, 0.5), backend="reference"), rtol=0, atol=2e-5
    )


@pytest.mark.usefixtures("tiles")
def test_greedy_ties_across_tiles_go_to_the_lowest_id():
    z = torch.zeros(2, 1300)
    z[0, [170, 171, 1299]] = 2.5
    z[1, [1025, 1280]] = 2.5
    greedy = blend_sample([z.to(DEVICE)], (1.0,), do_sample=False, seed=0, step=0)
    assert greedy.tokens.tolist() == [170, 1025]


@pytest.mark.usefixtures("tiles")
def test_a_tile_without_a_token_left_is_passed_over():
    """Its maximum is -inf: -inf - (-inf) must not reach the sums, nor noise the masked tokens."""
    z = torch.zeros(1, 1300, device=DEVICE)
    mask = torch.zeros(1300, dtype=torch.bool, device=DEVICE)
    mask[1200] = True
    for settings in ({}, {"top_k": 3}, {"top_p": 0.5}, {"do_sample": False}):
        out = blend_sample([z], (1.0,), mask=mask, seed=1, step=1, **settings)
        assert [x.item() for x in out[:3]] == [1200, 0.0, 0.0]


@pytest.mark.parametrize("cut", [{}, {"top_k": 300}, {"top_k": 4, "top_p": 0.9}, {"top_p": 0.97}])
def test_draws_among_many_groups(cut):
    """From a sharp row, whose mass is in one group, to a flat one, in which all take part."""
    p = Problem([normal(2, 5, 2900)[k].to(DEVICE) * 3 for k in range(2)], (1.0, 0.5))
    steps = torch.arange(5, device=DEVICE)
    settings = {"temperature": 0.3 * 2.5**steps, "seed": 2**63 + 5, "stream": 2**40, "step": steps}
    out = assert_samples_agree(Backend("triton", DEVICE), p, **settings, **cut)
    assert len(set((out.tokens // 256).tolist())) > 2


def test_tokens_that_float32_cannot_count(monkeypatch):
    """Of more than 2^24 tokens, the last of which is the only likely one."""
    vocab = 2**24 + 259
    monkeypatch.setattr(launchers, "tile_size", lambda rows, vocab: (2**20, 4))
    z = torch.zeros(1, vocab, dtype=torch.float16, device=DEVICE)
    z[0, -1] = 100.0
    assert blend_sample([z], (1.0,), seed=1, step=1).tokens.tolist() == [vocab - 1]


def test_small_powers_keep_their_digits():
    """A plain log-sum-exp over r = 1e-4 would be off by some 1e-3."""
    z = list(normal(3, 2, 300))
    ours = blend([x.to(DEVICE) for x in z], (0.2, 0.5, 0.3), power=1e-4)
    truth = ops.blend(z, (0.2, 0.5, 0.3), power=1e-4, backend="reference")
    torch.testing.assert_close(ours.cpu(), truth, rtol=0, atol=1e-5)


def test_outputs_do_not_follow_the_default_dtype():
    z = [normal(2, 40).to(DEVICE)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        results = {"return_term_logprobs": True, "return_pushes": True}
        drawn = blend_sample(z, (1.0,), top_k=3, seed=0, step=0, **results)
        log_p = blend(z, (1.0,))
    finally:
        torch.set_default_dtype(before)
    assert {x.dtype for x in (*drawn[1:], log_p)} == {torch.float32}
    truth = ops.blend([z[0].cpu()], (1.0,), backend="reference")
    torch.testing.assert_close(log_p.cpu(), truth)


# ---- Compiling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.sweep)])
def test_compiles_for_gpus_and_once_for_all_seeds(capability):
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton has no NVIDIA backend")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)  # the program imports what this file does
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def compile_all(capability: int) -> None:
    """Compiles what the launchers launch, without launching it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    compiled: list[str] = []
    run = JITFunction.run

    def compile_only(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        ptx = kernel.asm["ptx"]
        assert ".f64" not in ptx, f"{self.__name__} computes in float64"
        if self.__name__ == "fork_cache":  # else a row is overwritten before all have read it
            assert ptx.rindex("ld.global") < ptx.rindex("bar.sync") < ptx.index("st.global")
        assert kernel.metadata.shared <= 99 << 10, f"{self.__name__} fits no small GPU"
        compiled.append(kernel.hash)
        return kernel

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only

    rows, vocab = 3, 2100
    z = [torch.zeros(rows, vocab, dtype=t) for t in (torch.float32, torch.bfloat16, torch.float16)]
    floats, ints = torch.ones(rows), torch.ones(rows, dtype=torch.int64)
    everything = {
        "values": z[:1],
        "value_weights": (1.0,),
        "mask": torch.ones(rows, vocab, dtype=torch.bool),
        "support": Support(top_k=5, top_p=0.5, min_p=0.1),
        "return_term_logprobs": True,
    }
    per_row = {"temperature": floats, "seed": ints, "stream": ints, "step": ints}
    blend_sample(z, (1.0, 1.0, -1.0), do_sample=False, seed=0, step=0)
    blend_sample(z, torch.ones(rows, 3), **per_row, **everything, return_pushes=True)
    blend_sample(
        z, (0.5, 0.3, 0.2), top_k=ints, top_p=floats, min_p=floats, **per_row, **everything, power=1
    )
    blend([z[1][:1].expand(512, -1)], torch.ones(1), power=-1)  # enough for large tiles

    shard = Inputs(z, (0.5, 0.3, 0.2), power=1, parts=[Part([1.0, -1.0, 0.0], max=1.0)])
    shard.log_z = torch.zeros(rows, 3)
    backend.blend(shard, raw=True)
    for do_sample in (False, True):
        variants = []
        for first_token in (0, 1, 256, 2**31 - 1 - vocab):
            compiled.clear()
            draw = Draw(shard, do_sample=do_sample, seed=0, step=0, first_token=first_token)
            backend.draw_shard(shard, draw)
            variants.append(tuple(compiled))
        assert len(set(variants)) == 1, "a shard's first token compiled another kernel"

    for settings in ({}, {"top_k": 5}):
        variants = []
        for seed, stream, step in (
            (1, 0, 0),
            (0, 1, 1),
            (16, 2**31, 16),
            (2**64 - 1,) * 2 + (2**32 - 1,),
        ):
            compiled.clear()
            blend_sample(z, (1, 1, 1), seed=seed, stream=stream, step=step, **settings)
            variants.append(tuple(compiled))
        assert len(set(variants)) == 1, "a seed, stream or step compiled another kernel"

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens in (1, 30):  # one tile in splits, and several tiles
            q, k = (torch.zeros(rows, h, tokens, 80, dtype=dtype) for h in (6, 2))
            cache = torch.zeros(rows, 2, 600, 80, dtype=dtype)
            variants = []
            for window in (0, 1, 16):
                compiled.clear()
                backend.attend_(
                    Attention(q, k, k, cache, cache.clone(), ints, 0.1, window, 5.0, ints)
                )
                variants.append(tuple(compiled))
            assert len(set(variants)) == 1, "a window compiled another kernel"
            backend.attend_(Attention(q, k, k, cache, cache.clone(), ints, 0.1))
        if dtype is not torch.float16:  # heads whose tiles are large
            size, value_size, n = (80, 129, 5) if dtype is torch.float32 else (256, 256, 30)
            q, k, v = (
                torch.zeros(rows, h, n, d, dtype=dtype)
                for h, d in ((8, size), (1, size), (1, value_size))
            )
            backend.attend_(Attention(q, k, v, k.clone(), v.clone(), ints, 0.1))
        variants = []
        for start, end in ((0, 600), (1, 16), (16, 2**63 - 1)):
            compiled.clear()
            backend.fork_cache_([cache], ints, start, end)
            variants.append(tuple(compiled))
        assert len(set(variants)) == 1, "a position compiled another kernel"
        backend.fork_cache_([cache], ints, ints, ints)

    variants = []
    for shape, width in (((3, 64), 1), ((1, 50), 5), ((16, 1024), 16)):
        compiled.clear()
        backend.chunk_select(torch.zeros(shape), torch.zeros(shape) > 0, width)
        variants.append(tuple(compiled))
    assert len(set(variants)) == 1, "a number of slots compiled another kernel"

    targets, of_logits = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 5)
    most = logp_tiles.GPU_COLUMNS
    for dtype, columns in ((torch.float32, most), (torch.bfloat16, most), (torch.float16, 31)):
        scores, bias = torch.zeros(rows, columns), torch.zeros(columns)
        operand = scores.to(dtype)
        variants = []
        for first in (0, 1, 8192, 2**31 - 1):
            compiled.clear()
            for moments, b, softcap in ((0, None, 0.0), (1, None, 0.0), (2, bias, 30.0)):
                moment = [torch.zeros(rows, 4096) if moments > i else None for i in range(2)]
                sums = logp_tiles.Sums(torch.zeros(rows, 4), *moment)
                settings = logp_tiles.Settings(softcap, 0.7, -100)
                tile = logp_tiles.Tile(scores, operand, first, b, targets, settings)
                again = operand.clone() if moments > 1 else None
                logp_launchers.logp_forward(tile, sums, again)
                logp_launchers.logp_backward(tile, of_logits)
            variants.append(tuple(compiled))
        assert len(set(variants)) == 1, "a tile's place compiled another kernel"


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
