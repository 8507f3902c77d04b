"""Every kernel draws the tokens that the reference draws, whatever the settings of a draw."""

from typing import Any

import pytest
import torch
from agreement import IDS
from cases import INF, NAN, Backend, Problem, assert_samples_agree, normal, problem


@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_temperatures_that_overflow(kernel: Backend, cut: dict[str, Any]) -> None:
    """The lowest, whose inverse overflows, is greedy; the highest is uniform over what has mass."""
    z = normal(3, 100, 0, device=kernel.device)
    cold = kernel.blend_sample([z], [1.0], temperature=2e-39, **cut, **IDS)
    assert torch.equal(cold.tokens, z.argmax(dim=-1))
    z[:, 40:] = -INF
    hot = kernel.blend_sample([z], [1.0], temperature=3e38, **cut, **IDS)
    assert ((hot.tokens >= 0) & (hot.tokens < 40)).all()


def test_greedy_ties_go_to_the_lowest_id(kernel: Backend) -> None:
    vocab = 300
    z = torch.zeros(4, vocab, device=kernel.device)
    z[1, [299, 17, 130]] = 1.0
    z[2, [0, 299]] = 1.0
    z[3] = -1.0
    z[3, ::2] = -0.0  # equals +0
    z[3, 101] = 0.0
    out = assert_samples_agree(kernel, Problem([z], [1.0]), do_sample=False, seed=0, step=0)
    assert out.tokens.tolist() == [0, 17, 0, 0]
    assert out.sampled_logprobs.tolist() == [0.0] * 4


def test_greedy_leaves_settings_unused(kernel: Backend) -> None:
    """Settings are not read, even those that would spoil a sampled row."""
    p = problem(kernel)
    bad = torch.full((4,), NAN, device=kernel.device)
    out = kernel.blend_sample(*p.args, do_sample=False, temperature=bad, top_p=bad, seed=0, step=0)
    assert torch.equal(out.tokens, kernel.blend(*p.args).argmax(dim=-1))


SETTINGS: dict[str, tuple[Any, torch.dtype]] = {
    "temperature": (0.7, torch.float32),
    "top_k": (11, torch.int64),
    "top_p": (0.8, torch.float32),
    "min_p": (0.05, torch.float32),
    "seed": (2**62 + 1, torch.int64),
    "stream": (2**33 + 1, torch.int64),
    "step": (2**32 - 1, torch.int64),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_setting_as_tensor_is_the_number(kernel: Backend, name: str) -> None:
    value, dtype = SETTINGS[name]
    p = problem(kernel, rows=6)
    numbers = {k: v for k, (v, _) in SETTINGS.items()}
    want = kernel.blend_sample(*p.args, **numbers)
    scalar = torch.tensor(value, dtype=dtype, device=kernel.device)
    for tensor in (scalar, scalar.expand(6), torch.stack([scalar] * 12)[::2]):
        got = kernel.blend_sample(*p.args, **{**numbers, name: tensor})
        for a, b in zip(got[:3], want[:3], strict=True):
            assert torch.equal(a, b)


def test_settings_of_each_row(kernel: Backend) -> None:
    p = problem(kernel, rows=6, vocab=120)
    on = {"device": kernel.device}
    assert_samples_agree(
        kernel,
        p,
        temperature=torch.tensor([0.5, 1.0, 2.0, 0.1, 10.0, 1.0], **on),
        top_k=torch.tensor([0, 1, 5, 0, 120, 2**40], **on),
        top_p=torch.tensor([1.0, 0.5, 0.9, 0.2, 0.7, 0.0], **on),
        min_p=torch.tensor([0.0, 0.0, 0.1, 0.3, 0.01, 0.0], **on),
        seed=torch.tensor([0, 1, -1, 2**62, -(2**63), 7], **on),  # -1 is the bits of 2^64 - 1
        stream=torch.tensor([0, 2**32, -1, 5, 5, 5], **on),
        step=torch.tensor([0, 1, 2**32 - 1, 3, 4, 5], **on),
    )


def test_seeds_are_64_bits(kernel: Backend) -> None:
    """A number of 2^63 or more means the int64 of its bits; no word of seed or stream is lost."""
    p = problem(kernel, rows=2, vocab=500)
    flat = {"temperature": 100.0, "step": torch.arange(2, device=kernel.device)}
    drawn = set()
    for seed in (0, 1, 2**32, 2**63, 2**64 - 1):
        for stream in (0, 1, 2**32, 2**64 - 1):
            out = kernel.blend_sample(*p.args, **flat, seed=seed, stream=stream)
            drawn.add(tuple(out.tokens.tolist()))
        bits = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=kernel.device)
        again = kernel.blend_sample(*p.args, **flat, seed=bits, stream=stream)
        assert torch.equal(out.tokens, again.tokens)
    assert len(drawn) == 20


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 1e4, 1e30])
def test_extreme_temperatures(kernel: Backend, temperature: float) -> None:
    """Towards 0 they are greedy, towards infinity uniform over the tokens left."""
    p = problem(kernel, vocab=40)
    p.logits[0][:, 7] = -INF
    out = kernel.blend_sample(*p.args, temperature=temperature, **IDS)
    log_p = kernel.blend(*p.args)
    if temperature < 1:
        assert torch.equal(out.tokens, log_p.argmax(dim=-1))
        assert (out.sampled_logprobs.abs() < 1e-6).all()
    else:
        uniform = torch.full((4,), 39.0, device=kernel.device).log()
        torch.testing.assert_close(out.sampled_logprobs, -uniform, atol=2e-2, rtol=0)
    got = log_p.gather(1, out.tokens[:, None])[:, 0]
    torch.testing.assert_close(out.logprobs, got, atol=2e-5, rtol=0)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.5}], ids=str)
def test_tied_tokens_are_drawn_alike_however_cold(backend: Backend, cut: dict[str, Any]) -> None:
    """As at any temperature at which the others have no mass."""
    z = torch.full((12, 600), 5.0, device=backend.device)
    z[:, [3, 259, 260]] = 7.5
    ids = {"seed": 5, "stream": torch.arange(12, device=backend.device), "step": 0}
    cold, cool = (
        backend.blend_sample([z], [1.0], temperature=t, **ids, **cut) for t in (1e-30, 1e-2)
    )
    assert {*cold.tokens.tolist()} == {3, 259, 260}
    assert torch.equal(cold.tokens, cool.tokens)


def test_term_logprobs(kernel: Backend) -> None:
    """Log-probs under each term alone, whatever its weight and the mask; None unless asked for."""
    p = problem(kernel, rows=4, vocab=60, layout="padded")
    p.weights = [1.0, 0.0, -0.5]
    p.options["mask"] = torch.arange(60, device=kernel.device) % 2 == 0
    out = assert_samples_agree(kernel, p, seed=3, step=0)
    assert out.term_logprobs is not None
    for k, z in enumerate(p.logits):
        own = z[:, :60].double().log_softmax(dim=-1).gather(1, out.tokens[:, None])[:, 0]
        torch.testing.assert_close(out.term_logprobs[:, k].double(), own, atol=1e-5, rtol=0)
    assert kernel.blend_sample(*p.args, **p.options, seed=3, step=0).term_logprobs is None
