"""The pieces of a response, joined, are the response."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.inputs import read_requests, term_prompts
from crossfade.decoding.session.text import PARTIAL, TextStream
from crossfade.decoding.writing import Writing
from hypothesis import given, settings
from hypothesis import strategies as st
from served import FADED, PROMPT, SAMPLED, alone, apart, until
from tiny_models import make, make_letters
from tokenizer_kinds import KINDS, tokenizer_of

LONG: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": None, "do_sample": True}
WORDS = [
    "the film",
    " was",
    " bright",
    "!",
    "\n\n",
    " ",
    "é",
    "日本",
    "👍🏽",
    "🙂",
    "🙂🙂",
    "a",
    "it's",
]


@pytest.fixture(scope="module")
def session() -> Iterator[cf.Session]:
    with cf.Session(apart(), weights={"w": 0.6}, max_batch=8) as session:
        yield session


def stream(kind: str, prompt: str, stops: list[str]) -> TextStream:
    tokenizer = tokenizer_of(kind)
    prompts = term_prompts(read_requests(prompt), term="base", tokenizer=tokenizer)
    return TextStream(Writing(tokenizer, prompts), stops)


@pytest.mark.parametrize("kind", KINDS)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=8),
    cuts=st.lists(st.booleans(), min_size=64, max_size=64),
    stops=st.lists(st.sampled_from(["film was", "🙂", "\n", "bright!", "本", "a a"]), max_size=2),
    prompt=st.sampled_from(["hello", "hello ", "🙂"]),
)
@settings(max_examples=25, deadline=None)
def test_whole_characters(
    kind: str, words: list[str], cuts: list[bool], stops: list[str], prompt: str
) -> None:
    """However tokens come, singly or several at once, no character and no stop string is split."""
    text = stream(kind, prompt, stops)
    assert text.writing is not None
    (ids,) = text.writing.tokens([0], ["".join(words)])
    (whole,) = text.writing.texts([0], [ids])
    places = [whole.find(s) for s in stops if s in whole]
    told = ""
    for n in range(1, len(ids) + 1):
        if cuts[n % 64] or n == len(ids):
            piece = text.add(ids[:n])
            told += piece
            assert PARTIAL not in piece or PARTIAL in whole
            assert whole.startswith(told)
            assert not any(s in told for s in stops)
    told += text.end(ids)
    assert told == text.told == whole[: min(places, default=None)] == text.whole(ids)


def test_a_response_that_ends_within_a_character() -> None:
    for kind in KINDS:
        text = stream(kind, "hello", [])
        assert text.writing is not None
        (ids,) = text.writing.tokens([0], ["🙂日"])
        for n in range(1, len(ids)):
            few = stream(kind, "hello", [])
            told = "".join(few.add(ids[:k]) for k in range(1, n + 1))
            assert PARTIAL not in told or PARTIAL in text.whole(ids)
            assert told + few.end(ids[:n]) == few.told


def test_bytes_that_make_no_text() -> None:
    """A model that writes nothing but beginnings of characters is told of all the same."""
    text = stream("bytes", "hello", [])
    assert text.writing is not None
    (ids,) = text.writing.tokens([0], ["🙂"])
    written = ids[:1] * 100
    told = [text.add(written[:n]) for n in range(1, 101)]
    assert sum(map(len, told)) > 60
    assert text.end(written) is not None


def test_a_stop_string_over_pieces(session: cf.Session) -> None:
    terms = session._asking.terms
    whole = alone(terms, PROMPT, blend=FADED, weights={"w": 0.6}, seed=2, **LONG).text[0]
    stop = whole[9:14]
    request = session.submit(PROMPT, blend=FADED, seed=2, stop_strings=["nothing", stop], **LONG)
    told = [piece.text for piece in request]
    assert "".join(told) == request.text == whole[: whole.find(stop)]
    assert request.reason == "stop"
    assert request.result().text[0].startswith(request.text + stop)
    assert sum(len(p) > 0 for p in told) > 1, "it came in pieces"
    unread = session.submit(PROMPT, blend=FADED, seed=2, stop_strings=[stop], **LONG)
    until(lambda: unread.done)
    assert unread.text == request.text
    assert list(session.submit(PROMPT, max_new_tokens=1))[-1].text is not None


def test_all_that_is_told(session: cf.Session) -> None:
    """Ids, log-probs, those of the best tokens and of terms, and divergences are complete."""
    shown = {"return_term_logprobs": True, "return_kl_to_base": True}
    terms = session._asking.terms
    blend = cf.parse(FADED, **terms, w=0.6)
    want = cf.generate(blend, [PROMPT], seed=8, progress=False, **shown, **LONG)
    request = session.submit(PROMPT, blend=FADED, seed=8, top_logprobs=3, **shown, **LONG)
    pieces = list(request)
    got = {
        name: [x for piece in pieces for x in getattr(piece, name)]
        for name in ("ids", "logprobs", "top_logprobs", "term_logprobs", "kl")
    }
    assert got["ids"] == want.responses[0] == request.result().responses[0]
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(torch.tensor(got["logprobs"]), want.logprobs[0], **close)
    torch.testing.assert_close(torch.tensor(got["kl"]), want.kl_to_base[0], **close)
    each = torch.tensor([[at[name] for name in ("base", "x", "y")] for at in got["term_logprobs"]])
    torch.testing.assert_close(each, want.term_logprobs[0], **close)
    for name in ("logprobs", "term_logprobs", "kl_to_base"):
        torch.testing.assert_close(getattr(request.result(), name), getattr(want, name), **close)
    for i, best in enumerate(got["top_logprobs"]):
        scores = cf.score(blend, [PROMPT] * 3, [[*got["ids"][:i], t] for t in best])
        last = scores.logprobs[:, i]
        torch.testing.assert_close(torch.tensor([*best.values()]), last, **close)
        assert list(best.values()) == sorted(best.values(), reverse=True)
        assert len(best) == 3
        assert got["ids"][i] in best or got["logprobs"][i] <= min(best.values())


def test_a_search_tells_at_its_end(session: cf.Session) -> None:
    reward = cf.Reward(lambda prompts, texts: [float(sum(map(ord, t))) for t in texts])
    asked = LONG | {"search": cf.BestOfN(3, reward), "return_term_logprobs": True, "seed": 1}
    pieces = list(session.submit(PROMPT, blend=FADED, top_logprobs=2, **asked))
    want = alone(session._asking.terms, PROMPT, blend=FADED, weights={"w": 0.6}, **asked)
    assert [piece.ids for piece in pieces] == want.responses
    (piece,) = pieces
    assert piece.text == want.text[0]
    for column in (piece.logprobs, piece.top_logprobs, piece.term_logprobs):
        assert len(column) == len(piece.ids) == 40


def test_top_logprobs_of_few_tokens() -> None:
    """Tokens that cannot be drawn are not among the best, nor more than there are."""
    terms = {"base": cf.Model(make("llama"), tokenizer=make_letters())}
    with cf.Session(terms, blend="base.within(Support(term=0, top_k=2))") as session:
        r = session.submit(PROMPT, top_logprobs=20, **SAMPLED)
        assert all(len(best) == 2 for piece in r for best in piece.top_logprobs)


def test_fifty_at_once_in_one_event_loop(session: cf.Session) -> None:
    asked = [LONG | {"seed": i, "max_new_tokens": 2 + i % 7} for i in range(50)]

    async def read(i: int) -> list[int]:
        request = session.submit(PROMPT, blend=FADED, **asked[i])
        if i % 2:
            return (await request).responses[0]
        return [t async for piece in request for t in piece.ids]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*map(read, range(50)))

    got = asyncio.run(asyncio.wait_for(all_of_them(), 60))
    terms, weights = session._asking.terms, {"w": 0.6}
    for i in range(0, 50, 7):
        want = alone(terms, PROMPT, blend=FADED, weights=weights, **asked[i])
        assert got[i] == want.responses[0]
    assert list(map(len, got)) == [2 + i % 7 for i in range(50)]


def test_whoever_waits_may_go(session: cf.Session) -> None:
    """Event loops that are closed, tasks that are cancelled, and results that take too long."""
    request = session.submit(PROMPT, **LONG | {"max_new_tokens": 400})

    async def impatient() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_read(request), 0.01)
        asyncio.get_running_loop().create_task(_read(request))
        await asyncio.sleep(0)

    async def _read(request: cf.Request) -> None:
        await request

    asyncio.run(impatient())
    with pytest.raises(TimeoutError, match=f"request {request.id} has not ended in 0.001 s"):
        request.result(0.001)
    assert len(request.result(60).responses[0]) == 400
    assert session.alive


def test_one_thread_reads_while_another_waits(session: cf.Session) -> None:
    request = session.submit(PROMPT, seed=1, **LONG)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(request.result(30).responses[0]))
    thread.start()
    read = [t for piece in request for t in piece.ids]
    thread.join(30)
    assert found == [read]
    assert list(request) == [], "all of it was read"


def test_what_was_never_begun_has_all_that_was_asked_for() -> None:
    asked = {"return_pushes": True, "return_term_logprobs": True, "return_kl_to_base": True}
    with cf.Session(apart(), max_batch=1) as session:
        with session._worker._wake:  # No step begins before this is left.
            waiting = session.submit(PROMPT, max_new_tokens=4, **asked)
            waiting.cancel()
        output = waiting.result(30)
    assert waiting.reason == "cancelled"
    assert output.lengths.tolist() == [0]
    for found in (output.pushes, output.term_logprobs, output.kl_to_base):
        assert found is not None
        assert found.shape[:2] == (1, 0)
