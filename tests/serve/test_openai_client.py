"""The `openai` package over a server: what its users write, and what they get."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from scripted import Session, logprob_of
from servers import Running, soon

CHAT: list[Any] = [{"role": "user", "content": "the film"}]


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_a_chat_is_answered(client: openai.OpenAI, server: Running) -> None:
    answer = client.chat.completions.create(model="crossfade", messages=CHAT, seed=1)
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert choice.logprobs is None
    assert len(str(choice.message.content).split()) == server.session.length
    (request,) = server.session.requests
    assert answer.usage.prompt_tokens == len(request.prompt_ids)
    assert answer.usage.completion_tokens == server.session.length + 1  # with the end
    assert answer.usage.total_tokens == len(request.prompt_ids) + server.session.length + 1
    assert (answer.model, answer.object) == ("crossfade", "chat.completion")
    assert answer.id.startswith("chatcmpl-")
    again = client.chat.completions.create(model="crossfade", messages=CHAT, seed=1)
    assert again.choices == answer.choices


def test_a_stream_has_the_text_of_the_whole_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "base", "messages": CHAT, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**options)
    texts, ends, roles = ["", "", ""], {}, {}
    for chunk in client.chat.completions.create(**options, stream=True):
        assert chunk.usage is None
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            roles.setdefault(choice.index, choice.delta.role)
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason
    assert texts == [c.message.content for c in whole.choices]
    assert len(set(texts)) == 3  # each sample has draws of its own
    assert ends == dict.fromkeys(range(3), "stop")
    assert roles == dict.fromkeys(range(3), "assistant")


def test_a_stream_tells_its_usage_on_request_alone(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "base", "messages": CHAT, "stream": True}
    plain = list(client.chat.completions.create(**options))
    assert all("usage" not in chunk.model_fields_set for chunk in plain)
    asked = list(client.chat.completions.create(**options, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in asked[:-1]] == [None] * (len(asked) - 1)
    assert all("usage" in chunk.model_fields_set for chunk in asked)
    assert asked[-1].choices == []
    assert asked[-1].usage.completion_tokens == 7


def test_texts_are_continued(client: openai.OpenAI, server: Running) -> None:
    prompts: Any = ["the film", "the plot was", [8, 9, 10]]
    one = client.completions.create(model="kind", prompt=prompts[1], seed=5, n=2)
    many = client.completions.create(model="kind", prompt=prompts[:2], seed=5, n=2)
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    assert [c.text for c in many.choices[2:]] == [c.text for c in one.choices]
    ids = client.completions.create(model="kind", prompt=[prompts[2], [8]], max_tokens=3)
    assert [c.finish_reason for c in ids.choices] == ["length", "length"]
    assert server.session.requests[-1].inputs == [8]
    assert ids.usage.prompt_tokens == 4
    assert ids.usage.completion_tokens == 6
    assert {r.options["blend"] for r in server.session.requests} == {"kind"}


def test_texts_are_streamed(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "base", "prompt": ["a", "the"], "seed": 3, "logprobs": 2}
    whole = client.completions.create(**options)
    texts: list[str] = ["", ""]
    offsets: list[list[int]] = [[], []]
    for chunk in client.completions.create(**options, stream=True):
        assert chunk.object == "text_completion"
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                offsets[choice.index] += choice.logprobs.text_offset or []
    assert texts == [c.text for c in whole.choices]
    assert offsets == [c.logprobs.text_offset for c in whole.choices]


def test_the_best_of_several_are_given(client: openai.OpenAI, server: Running) -> None:
    answer = client.completions.create(
        model="base", prompt="a", n=2, best_of=5, max_tokens=4, logprobs=0, seed=8
    )
    means = [sum(map(logprob_of, r.written)) / 4 for r in server.session.requests]
    found = [sum(c.logprobs.token_logprobs) / 4 for c in answer.choices]
    assert found == sorted(means, reverse=True)[:2]
    assert len(set(means)) > 2
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == 20  # what was written, not what is given


def test_log_probs_of_a_chat(client: openai.OpenAI, server: Running) -> None:
    answer = client.chat.completions.create(
        model="base", messages=CHAT, logprobs=True, top_logprobs=2, max_tokens=3
    )
    content = answer.choices[0].logprobs.content
    assert [x.logprob for x in content] == [*map(logprob_of, server.session.requests[0].written)]
    assert "".join(x.token for x in content) == answer.choices[0].message.content.replace(" ", "")
    for x in content:
        assert bytes(x.bytes).decode() == x.token
        assert [t.token for t in x.top_logprobs] == [x.token, "<unk>"]
        assert x.top_logprobs[0].logprob == x.logprob


def test_log_probs_of_texts_and_their_prompts(client: openai.OpenAI, server: Running) -> None:
    answer = client.completions.create(
        model="base", prompt="the film was", logprobs=1, echo=True, max_tokens=2
    )
    (choice,) = answer.choices
    found, written = choice.logprobs, [*map(logprob_of, server.session.requests[0].written)]
    assert choice.text.startswith("the film was")
    assert found.tokens[:3] == ["the", "film", "was"]
    assert found.token_logprobs == pytest.approx([None, -0.1, -0.2, *written])
    assert found.top_logprobs[0] is None
    assert found.top_logprobs[1] == pytest.approx({"<unk>": -0.05, "film": -0.1})
    assert found.text_offset == [0, 3, 7, 10, 10 + len(found.tokens[3])]


def test_a_prompt_alone_is_scored(client: openai.OpenAI, server: Running) -> None:
    answer = client.completions.create(
        model="base", prompt=[[8, 9], [10, 11, 12]], logprobs=0, echo=True, max_tokens=0
    )
    assert [c.text for c in answer.choices] == ["great awful", "film the a"]
    assert [c.logprobs.token_logprobs for c in answer.choices] == [
        pytest.approx([None, -0.1]),
        pytest.approx([None, -0.1, -0.2]),
    ]
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 0
    assert server.session.requests == []
    streamed = list(
        client.completions.create(
            model="base", prompt=[8, 9], logprobs=0, echo=True, max_tokens=0, stream=True
        )
    )
    assert "".join(c.text for x in streamed for c in x.choices) == "great awful"


def test_fifty_at_once_get_what_each_gets_alone(serve: Any) -> None:
    server = serve(Session(length=20))
    server.session.delay = 0.001

    async def texts(seeds: range, together: int) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            limit = asyncio.Semaphore(together)

            async def text(seed: int) -> str:
                async with limit:
                    stream = await client.chat.completions.create(
                        model="base", messages=CHAT, seed=seed, stream=True
                    )
                    return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*map(text, seeds))

    together = asyncio.run(texts(range(50), 50))
    assert len(set(together)) == 50
    assert asyncio.run(texts(range(0, 50, 10), 1)) == together[::10]
    soon(lambda: server.app.state.service.calls.load == 0)


def test_extensions_reach_the_session(client: openai.OpenAI, server: Running) -> None:
    answer = client.chat.completions.create(
        model="crossfade",
        messages=CHAT,
        max_completion_tokens=2,
        temperature=0.5,
        logit_bias={"9": -100},
        presence_penalty=0.5,
        seed=-1,
        user="somebody",
        extra_body={
            "blend": "base + v * kind",
            "weights": {"v": 0.5},
            "systems": {"kind": "Be kind."},
            "top_k": 5,
            "return_pushes": True,
            "return_term_logprobs": True,
            "return_kl_to_base": True,
        },
    )
    options = server.session.requests[0].options
    expected = {
        "blend": "base + v * kind",
        "weights": {"v": 0.5},
        "systems": {"kind": "Be kind."},
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 1.0,
        "seed": 2**64 - 1,
        "logit_bias": {9: -100},
        "presence_penalty": 0.5,
        "max_new_tokens": 2,
        "scope": "",
    }
    assert {name: options[name] for name in expected} == expected
    choice: Any = answer.choices[0]
    assert choice.pushes == [{"w": 0.5}] * 2
    assert choice.term_logprobs == [{"base": -1.0, "kind": -9999.0}] * 2
    assert choice.kl_to_base == [0.125, 9999.0]


def test_a_prediction_is_a_draft(client: openai.OpenAI, server: Running) -> None:
    answer = client.chat.completions.create(
        model="base",
        messages=CHAT,
        prediction={"type": "content", "content": "great film was the a"},
    )
    assert server.session.requests[0].options["draft"].texts == ["great film was the a"]
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens == 3
    assert details.rejected_prediction_tokens == 2


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["crossfade", "base", "kind"]


def test_errors_are_those_that_the_client_knows(
    client: openai.OpenAI, server: Running, serve: Any
) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="did you mean 'kind'") as missing:
        create(model="knid", messages=CHAT)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature is -1") as refused:
        create(model="base", messages=CHAT, temperature=-1)
    assert refused.value.param == "temperature"
    server.session.full = True
    with pytest.raises(openai.RateLimitError, match="256 requests wait") as full:
        create(model="base", messages=CHAT)
    assert full.value.response.headers["retry-after"] == "1"
    server.session.alive = False
    with pytest.raises(openai.InternalServerError, match="engine has stopped") as dead:
        create(model="base", messages=CHAT)
    assert dead.value.status_code == 503


def test_a_text_that_fails_is_an_error(client: openai.OpenAI, server: Running) -> None:
    server.session.fails_at = 2
    with pytest.raises(openai.InternalServerError, match="request 0: a NaN"):
        client.chat.completions.create(model="base", messages=CHAT)
    stream = client.chat.completions.create(model="base", messages=CHAT, stream=True)
    with pytest.raises(openai.APIError, match="request 1: a NaN"):
        list(stream)
