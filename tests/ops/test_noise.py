"""The noise of sampling: Philox's published vectors, the counter layout, Gumbel's extremes.

A backend shows its noise through draws between two tokens: which of them wins turns over where the
difference of their logits crosses that of their noise.
"""

import numpy as np
import pytest
import torch
from cases import INF, Backend
from crossfade.ops import noise as torch_noise
from numpy_noise import GROUP, group_words, gumbel, noise_words, philox4x32
from scipy.stats import norm

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
ENDS = [(0, 0, 0), (2**64 - 1, 2**64 - 1, 2**32 - 1), (2**63, 2**32, 1)]
PLACES = [*ENDS, WIDEST, *(place[1:4] for place in EXTREMES)]
VOCAB = 16

# word, and a place where a group has it: seed, stream, step, group
GROUP_EXTREMES = [
    (0x00000000, 7, 0x77E96ED11F9AA454, 2267485923, 1),
    (0x7FFFFFFF, 0xFEDCBA9889ABCDEF, 0xEB8F68D2A0067E6B, 625051389, 10),
    (0x80000000, 1, 0x49773231AE8BD798, 1248649210, 12),
    (0xFFFFFF80, 5, 0xB2CA583D316D2429, 3755579998, 11),
    (0xFFFFFFFF, 0, 0x7D265313AFD38573, 73191899, 7),
]
WIDEST_GROUPS = (11, 0x86837A3192F0EA3D, 3003951988)  # group 5 has word 2^32 - 1, group 6 word 0
LAST_GROUP = (9, 0x48971835A379961F, 1726464748)  # group 593, of 151,936 tokens, has word 2^32 - 1
GROUP_PLACES = [*ENDS, WIDEST_GROUPS, *(place[1:4] for place in GROUP_EXTREMES)]
GROUPS = 16


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert [int(w) for w in philox4x32(counter, key)] == words
    step, stream, seed = counter[1], counter[2] | counter[3] << 32, key[0] | key[1] << 32
    got = torch_noise.philox(*(torch.tensor(bits(x)) for x in (counter[0], step, stream, seed)))
    assert [int(w) for w in got] == words


def test_extremes_are_where_the_table_says() -> None:
    for word, seed, stream, step, token in EXTREMES:
        assert noise_words(seed, stream, step, VOCAB)[0, token] == word
    words = noise_words(*WIDEST, VOCAB)[0]
    assert (words[5], words[6]) == (0xFFFFFFFF, 0)
    for word, seed, stream, step, group in GROUP_EXTREMES:
        assert group_words(seed, stream, step, GROUPS)[0, group] == word
    words = group_words(*WIDEST_GROUPS, GROUPS)[0]
    assert (words[5], words[6]) == (0xFFFFFFFF, 0)
    assert group_words(*LAST_GROUP, 594)[0, 593] == 0xFFFFFFFF


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
        noise = gumbel(noise_words(*place, VOCAB))[0]
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
    noise = gumbel(noise_words(seed, stream, step, VOCAB))[0]
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
    noise = gumbel(noise_words(*WIDEST, VOCAB))[0]
    gap = float(noise[5] - noise[6])
    assert 26.0 < gap < 26.1
    logits = torch.tensor([duel(6, 5, gap + margin)], device=backend.device)
    out = backend.blend_sample([logits], [1.0], **settings([WIDEST], backend.device))
    assert out.tokens.tolist() == [6 if margin > 0 else 5]


def test_tokens_past_the_first_words(backend: Backend) -> None:
    """Token v takes word v mod 4 of counter v // 4, also in a row longer than the duels'."""
    vocab, streams = 203, [0, 2**40 + 1]
    noise = gumbel(noise_words(3, streams, 9, vocab))
    out = backend.blend_sample(
        [torch.zeros(2, vocab, device=backend.device)],
        [1.0],
        seed=3,
        stream=torch.tensor(streams, device=backend.device),
        step=9,
    )
    assert out.tokens.tolist() == noise.argmax(axis=1).tolist()


# ---- Noise of groups -----------------------------------------------------------------------------


def group_noise(place: tuple[int, int, int], groups: int = GROUPS) -> np.ndarray:
    return gumbel(group_words(*place, groups))[0]


def token_noise(place: tuple[int, int, int], group: int) -> np.ndarray:
    """The noise `[GROUP]` of a group's tokens."""
    first = group * GROUP // 4
    return gumbel(noise_words(*place, GROUP, first=first))[0]


def two_in(row: torch.Tensor, group: int, places: tuple[int, int], mass: float, lead: float) -> int:
    """Leave two tokens of a group, the first ahead by `lead`, with the log of their mass."""
    first, other = (group * GROUP + place for place in places)
    row[first], row[other] = lead / 2, -lead / 2
    row[[first, other]] += mass - float(np.logaddexp(lead / 2, -lead / 2))
    return first


@pytest.mark.parametrize("margin", [1e-4, -1e-4])
@pytest.mark.parametrize("margin_within", [1e-4, -1e-4])
def test_noise_of_every_group(backend: Backend, margin: float, margin_within: float) -> None:
    """Two groups of two tokens: which group wins turns over within 1e-4, and which of its tokens.

    The last of the groups is no whole one.
    """
    rows, places, expected = [], [], []
    for n, place in enumerate(GROUP_PLACES):
        noise = group_noise(place)
        for group in range(1, GROUPS):
            if backend.interpreted and (n * (GROUPS - 1) + group) % 19:
                continue
            row = torch.full(((GROUPS - 1) * GROUP + 3,), -INF, dtype=torch.float64)
            winners = []
            for j, mass in ((0, 0.0), (group, float(noise[0] - noise[group]) + margin)):
                a, b = (2, 0) if j == GROUPS - 1 else (17 * j % 256, (17 * j + 101) % 256)
                own = token_noise(place, j)
                first = two_in(row, j, (a, b), mass, float(own[b] - own[a]) + margin_within)
                winners.append(first if margin_within > 0 else first - a + b)
            rows.append(row.float())
            places.append(place)
            expected.append(winners[margin > 0])
    logits = torch.stack(rows).to(backend.device)
    out = backend.blend_sample([logits], [1.0], **settings(places, backend.device))
    assert out.tokens.tolist() == expected
    assert torch.stack(out[1:3]).isfinite().all()


@pytest.mark.parametrize("margin", [1e-4, -1e-4])
@pytest.mark.parametrize("tokens", [1, GROUP])
def test_widest_gap_of_groups(backend: Backend, margin: float, tokens: int) -> None:
    """A group 26.01 nats below the best can win: a kernel must not spare its noise.

    So can a group of many tokens each of which, alone, is too far below the best one.
    """
    noise = group_noise(WIDEST_GROUPS)
    gap = float(noise[5] - noise[6])
    assert 26.0 < gap < 26.1
    row = torch.full((7 * GROUP,), -INF)
    row[5 * GROUP : 5 * GROUP + tokens] = margin - gap - float(np.log(tokens))
    row[6 * GROUP + 9] = 0.0
    logits = row[None].to(backend.device)
    out = backend.blend_sample([logits], [1.0], **settings([WIDEST_GROUPS], backend.device))
    of_five = 5 * GROUP + int(token_noise(WIDEST_GROUPS, 5)[:tokens].argmax())
    assert out.tokens.tolist() == [of_five if margin > 0 else 6 * GROUP + 9]


@pytest.mark.parametrize(("word", "seed", "stream", "step", "group"), GROUP_EXTREMES)
def test_groups_without_tokens_never_win(
    backend: Backend, word: int, seed: int, stream: int, step: int, group: int
) -> None:
    """However large their noise: -inf + 22.88 is no score, and no NaN."""
    noise = group_noise((seed, stream, step))
    row = torch.zeros(GROUPS, GROUP)
    row[group] = -INF
    place = {"seed": seed, "stream": stream, "step": step}
    out = backend.blend_sample([row.view(1, -1).to(backend.device)], [1.0], **place)
    winner = int(np.where(np.arange(GROUPS) == group, -INF, noise).argmax())
    token = int(token_noise((seed, stream, step), winner).argmax())
    assert out.tokens.tolist() == [winner * GROUP + token]
    assert out.logprobs.isfinite().all()


@pytest.mark.parametrize("margin", [1e-4, -1e-4])
def test_noise_of_the_last_group(backend: Backend, margin: float) -> None:
    """Of a long row, whose last group is half a one."""
    if backend.interpreted:
        pytest.skip("too long for an interpreter")
    noise = group_noise(LAST_GROUP, 594)
    row = torch.full((151_936,), -INF)
    row[0], row[-1] = 0.0, float(noise[0] - noise[593]) + margin
    logits = row[None].to(backend.device)
    out = backend.blend_sample([logits], [1.0], **settings([LAST_GROUP], backend.device))
    assert out.tokens.tolist() == [151_935 if margin > 0 else 0]


def test_groups_past_the_first_words(backend: Backend) -> None:
    """Group j takes word j mod 4 of counter 2^31 | j // 4, and its tokens go on counting."""
    groups, streams = 40, [0, 2**40 + 1] if backend.interpreted else [*range(30), 2**40 + 1]
    row = torch.zeros((groups - 1) * GROUP + 1)
    row[-1] = float(np.log(GROUP))  # the last group is one token, of the mass of the others
    expected = []
    for stream in streams:
        group = int(group_noise((3, stream, 9), groups).argmax())
        own = token_noise((3, stream, 9), group)
        expected.append(group * GROUP + (0 if group == groups - 1 else int(own.argmax())))
    out = backend.blend_sample(
        [row.expand(len(streams), -1).to(backend.device)],
        [1.0],
        seed=3,
        stream=torch.tensor(streams, device=backend.device),
        step=9,
    )
    assert out.tokens.tolist() == expected


def test_groups_share_no_counter_with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 2^31 - 1, the last that a row can have, is below the first of the groups' counters.

    All counters of a row differ, and one key maps different counters to different blocks of words.
    """
    counters: list[torch.Tensor] = []
    blocks: list[torch.Tensor] = []

    def spy(counter: torch.Tensor, *ids: torch.Tensor) -> list[torch.Tensor]:
        words = philox(counter, *ids)
        counters.append(counter.flatten())
        blocks.append(torch.stack([w.flatten() for w in words], dim=-1))
        return words

    philox = torch_noise.philox
    monkeypatch.setattr(torch_noise, "philox", spy)
    noise = torch_noise.Noise(*(torch.tensor([x]) for x in (1, 2, 3)))
    last = 2**31 // GROUP - 1
    for group in (0, 1, last):
        noise.of_tokens(torch.tensor([group]))
    noise.of_groups(600)
    assert counters[2].max() == 2**29 - 1
    assert counters[3].min() == 2**31
    assert torch.cat(counters).unique().numel() == 3 * GROUP // 4 + 150
    assert torch.cat(blocks).unique(dim=0).shape == (3 * GROUP // 4 + 150, 4)


@pytest.mark.parametrize("axis", ["seed", "stream", "step"])
def test_noise_is_not_correlated(axis: str) -> None:
    """Of groups and tokens, with one another and with those 0, 1 and 4 places on along an axis."""
    rows, each = 20_000, 8
    ids = {"seed": torch.tensor([5]), "stream": torch.tensor([6]), "step": torch.tensor([7])}
    ids = {name: x.expand(rows) for name, x in ids.items()} | {axis: torch.arange(rows)}
    noise = torch_noise.Noise(**ids)
    tokens = noise.of_tokens(torch.tensor([0]).expand(rows))
    numbers = torch.cat([noise.of_groups(each), tokens[:, :each], tokens[:, -each:]], dim=1)
    u = (-(-numbers).exp()).exp()  # uniform
    u = (u - 0.5) * 12**0.5
    level = 1e-4 / (3 * (3 * each) ** 2)  # of each correlation: Bonferroni's
    for lag in (0, 1, 4):
        r = u[: rows - lag].T @ u[lag:] / (rows - lag)
        if lag == 0:
            assert (r.diagonal() - 1).abs().max() < 0.03  # the variance
            r.fill_diagonal_(0)
        assert float(r.abs().max()) * (rows - lag) ** 0.5 < norm.isf(level / 2)
