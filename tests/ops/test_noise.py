"""The noise of sampling: Philox's published vectors, the counter layout, Gumbel's extremes.

A backend shows its noise through draws between two tokens: which of them wins turns over where the
difference of their logits crosses that of their noise.
"""

import cases
import numpy as np
import pytest
import torch
from cases import INF, Backend
from crossfade.ops import reference

# kat_vectors of Random123 for philox4x32-10: counter, key, output
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

# word, and a place that has it (found by running Philox backwards): seed, stream, step, token
EXTREMES = [
    (0x00000000, 7, 0x1BAD02948ADB8630, 3639448132, 1),
    (0x7FFFFFFF, 0xFEDCBA9889ABCDEF, 0x7D930F13C3D918ED, 628805419, 10),
    (0x80000000, 1, 0xEA169E6055794345, 572388316, 4),
    (0xFFFFFF80, 5, 0x1F371A8B7A7FC263, 1725361432, 4),  # the first that float32 rounds to u = 1
    (0xFFFFFFFF, 0, 0xC1A710BAB48DC8CA, 960378700, 7),
]
WIDEST = (11, 0xB31AF9FEA3AC5FC4, 2407436532)  # token 5 has word 2^32 - 1, token 6 has word 0
PLACES = [(0, 0, 0), (2**64 - 1, 2**64 - 1, 2**32 - 1), (2**63, 2**32, 1), WIDEST]
PLACES += [place[1:4] for place in EXTREMES]
VOCAB = 16


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert [int(w) for w in cases.philox4x32(counter, key)] == words
    step, stream, seed = counter[1], counter[2] | counter[3] << 32, key[0] | key[1] << 32
    got = reference.philox(*(torch.tensor(bits(x)) for x in (counter[0], step, stream, seed)))
    assert [int(w) for w in got] == words


def test_extremes_are_where_the_table_says() -> None:
    for word, seed, stream, step, token in EXTREMES:
        assert cases.noise_words(seed, stream, step, VOCAB)[0, token] == word
    words = cases.noise_words(*WIDEST, VOCAB)[0]
    assert (words[5], words[6]) == (0xFFFFFFFF, 0)


def bits(word: int) -> int:
    """An integer below 2^64 as the int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word


def settings(places: list[tuple[int, int, int]], device: str) -> dict[str, torch.Tensor]:
    columns = zip(*places, strict=True)
    names = ("seed", "stream", "step")
    return {
        name: torch.tensor([bits(x) for x in column], device=device)
        for name, column in zip(names, columns, strict=True)
    }


def duel(a: int, b: int, lead: float) -> list[float]:
    """Logits with two tokens left, the first ahead by `lead`."""
    row = [-INF] * VOCAB
    row[a], row[b] = lead / 2, -lead / 2
    return row


@pytest.mark.parametrize("margin", [1e-4, -1e-4])
def test_noise_of_every_token(backend: Backend, margin: float) -> None:
    """Within 1e-4, at both ends of seeds, streams and steps, and where the noise is extreme."""
    rows, places, expected = [], [], []
    for place in PLACES:
        noise = cases.gumbel(cases.noise_words(*place, VOCAB))[0]
        assert (np.abs(noise - 9.87) < 13.01).all()  # within [-3.14, 22.88]
        for token in range(1, VOCAB):
            rows.append(duel(token, 0, float(noise[0] - noise[token]) + margin))
            places.append(place)
            expected.append(token if margin > 0 else 0)
    if backend.interpreted:  # 7 is prime to the 15 tokens of a place
        rows, places, expected = rows[::7], places[::7], expected[::7]
    logits = torch.tensor(rows, device=backend.device)
    out = backend.blend_sample([logits], [1.0], **settings(places, backend.device))
    assert out.tokens.tolist() == expected
    assert torch.stack(out[1:3]).isfinite().all()


@pytest.mark.parametrize(("word", "seed", "stream", "step", "token"), EXTREMES)
def test_extreme_noise(
    backend: Backend, word: int, seed: int, stream: int, step: int, token: int
) -> None:
    """Seeds as numbers; a removed token stays removed however large its noise (not inf - inf)."""
    place = {"seed": seed, "stream": stream, "step": step}
    noise = cases.gumbel(cases.noise_words(seed, stream, step, VOCAB))[0]
    other = (token + 1) % VOCAB
    lead = float(noise[other] - noise[token])
    rows = [duel(token, other, lead + 1e-4), duel(token, other, lead - 1e-4), [0.0] * VOCAB]
    rows[2][token] = -INF
    out = backend.blend_sample([torch.tensor(rows, device=backend.device)], [1.0], **place)
    without = np.where(np.arange(VOCAB) == token, -INF, noise).argmax()
    assert out.tokens.tolist() == [token, other, int(without)]
    assert out.logprobs.isfinite().all()


@pytest.mark.parametrize("margin", [1e-4, -1e-4])
def test_widest_gap_that_noise_can_close(backend: Backend, margin: float) -> None:
    """A token 26.01 nats below the best can win: a kernel must not spare its noise."""
    noise = cases.gumbel(cases.noise_words(*WIDEST, VOCAB))[0]
    gap = float(noise[5] - noise[6])
    assert 26.0 < gap < 26.1
    logits = torch.tensor([duel(6, 5, gap + margin)], device=backend.device)
    out = backend.blend_sample([logits], [1.0], **settings([WIDEST], backend.device))
    assert out.tokens.tolist() == [6 if margin > 0 else 5]


def test_tokens_past_the_first_words(backend: Backend) -> None:
    """Token v takes word v mod 4 of counter v // 4, also in a row longer than the duels'."""
    vocab, streams = 203, [0, 2**40 + 1]
    noise = cases.gumbel(cases.noise_words(3, streams, 9, vocab))
    out = backend.blend_sample(
        [torch.zeros(2, vocab, device=backend.device)],
        [1.0],
        seed=3,
        stream=torch.tensor(streams, device=backend.device),
        step=9,
    )
    assert out.tokens.tolist() == noise.argmax(axis=1).tolist()
