"""What a request may say: every field is used, changes nothing by design, or is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import crossfade as cf
import pytest
from crossfade.serve import Settings
from crossfade.serve.limits import Limits
from servers import Running, running

CHAT = {"messages": [{"role": "user", "content": "the film"}]}
TEXT = {"prompt": "the film"}
FEW = Limits(max_tokens=50, cost=24, terms=3)
VALUE = cf.Reward(lambda prompts, responses: [0.0] * len(responses))


@pytest.fixture(scope="module")
def standing() -> Iterator[Running]:
    with running(settings=Settings(limits=FEW)) as found:
        yield found


def refusal(answer: Any) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["param"], error["message"]


@pytest.mark.parametrize("body", [[], 1, None, "text", True, [CHAT], {}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_a_body_must_be_an_object_with_what_is_needed(
    server: Running, path: str, body: Any
) -> None:
    status, _, message = refusal(server.post(path, body))
    assert status == 400
    if body == {}:
        assert "missing" in message or "give one of them" in message
    else:
        assert message.startswith("the body is")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b"\xff{}", "not UTF-8"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no number of JSON"),
        (b'{"prompt": "a", "metadata": {"x": -Infinity}}', "-Infinity is no number"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature is inf"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "not JSON that can be read"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"metadata": ' + b"[" * 200 + b"]" * 200 + b"}", "nested"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(2000)) + b"}", "2000 keys"),
        (b"", "the body is missing"),
    ],
)
def test_bodies_are_json_to_the_letter(server: Running, body: bytes, says: str) -> None:
    answer = server.http.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    status, _, message = refusal(answer)
    assert status == 400
    assert says in message


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temprature": 1}, "temprature", "not a field that is known; did you mean 'temperature'?"),
        ({"temperature": "1"}, "temperature", "temperature is '1'; it must be a valid number"),
        ({"temperature": True}, "temperature", "temperature is True; it must be a valid number"),
        ({"n": 1.5}, "n", "n is 1.5; it must be a valid integer"),
        ({"n": 0}, "n", "n is 0; it must be greater than or equal to 1"),
        ({"n": 129}, "n", "n is 129; it must be less than or equal to 128"),
        ({"max_tokens": 51}, "max_tokens", "max_tokens is 51; it must be at most 50"),
        ({"top_p": 0}, "top_p", "top_p is 0; it must be greater than 0"),
        ({"stop": ["a", 1]}, "stop", "it must be a text or a list of texts"),
        ({"stop": [""]}, "stop", "it must be a text or a list of texts"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "is 101; it must be less than or equal to 100"),
        ({"weights": {"w": None}}, "weights.w", "weights.w is None; it must be a valid number"),
        ({"weights": {"v": 1}}, "weights", "weights has 'v'; the faders are w"),
        ({"model": "gpt"}, "model", "there is no model 'gpt'"),
        ({"blend": "base +"}, "blend", "blend: invalid syntax"),
        ({"blend": "base.config"}, "blend", "only names, numbers"),
        ({"blend": "__import__('os')"}, "blend", "unknown function '__import__'"),
        ({"blend": "x" * 4097}, "blend", "at most 4096 characters"),
        ({"blend": "power_mean([base, kind], [0.5, 0.5], r=2)"}, "blend", "blend is a power mean"),
        ({"lora": [{"id": 7, "scale": 1}]}, "lora", "the last one is 1"),
        ({"lora": [{"name": "knid", "scale": 1}]}, "lora", "did you mean 'kind'?"),
        ({"lora": [{"id": 0, "name": "base", "scale": 1}]}, "lora[0]", "not both"),
        ({"search": {"best_of": 4}}, "search.value", "this server has none"),
        ({"search": {"best_of": 4, "width": 2}}, "search", "one of best_of, width and tournament"),
        ({"search": {"best_of": 4, "samples": 2}}, "search", "belong to width"),
        ({"search": {"best_of": 4, "value": "os:system"}}, "search.value", "this server has none"),
        ({"search": {"width": 1024, "samples": 2}}, "search", "2048 rows"),
        ({"draft": "/etc/passwd"}, "draft", "this server has prompt"),
        ({"draft": "prompt", "prediction": {"type": "content", "content": "a"}}, None, "both"),
        ({"negative_prompt": "b"}, None, "negative_prompt is given without guidance_scale"),
        ({"stream_options": {"include_usage": True}}, None, "without stream"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_what_is_wrong_is_named(
    server: Running, fields: dict[str, Any], param: str | None, says: str, chat: bool
) -> None:
    path, body = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", TEXT)
    status, named, message = refusal(server.post(path, {**body, **fields}))
    assert status == (404 if "model" in fields else 400)
    assert says in message
    if param is not None:
        assert named is not None
        assert named.startswith(param) or message.startswith(param)
    assert server.session.requests == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"suffix": "a"}, "suffix is not supported"),
        ({"prompt": [1, "a"]}, "prompt is not of its form; it must be a text, a list of texts"),
        ({"prompt": [[]]}, "prompt is not of its form"),
        ({"prompt": [-1]}, "prompt is not of its form"),
        ({"prompt": []}, "prompt is not of its form"),
        ({"prompt": [60, 61]}, "prompt has id 61; ids must be within [0, 61)"),
        ({"best_of": 2, "stream": True}, "leave stream out"),
        ({"best_of": 1, "n": 2}, "best_of is 1; it must be at least n, 2"),
        ({"max_tokens": 0}, "it must be above 0 without echo and logprobs"),
        ({"logprobs": True}, "logprobs is True"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"echo": True, "logprobs": 1, "guidance_scale": 2.0}, "guidance_scale is given with echo"),
        ({"max_completion_tokens": 2}, "max_completion_tokens is not a field that is known"),
    ],
)
def test_fields_of_texts(server: Running, fields: dict[str, Any], says: str) -> None:
    status, param, message = refusal(server.post("/v1/completions", {**TEXT, **fields}))
    assert (status, says in message) == (400, True), message
    assert param is None or param in (*fields, "prompt")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": []}, "messages is []"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role is 'robot'"),
        ({"messages": [{"role": "user"}]}, "content is missing"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content is not of its form"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content is not of its form; it must be a text or a list of parts",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format.type is 'json_object'"),
        ({"tool_choice": "required"}, "tool_choice is 'required'"),
        ({"functions": [{}]}, "functions is not supported"),
        ({"audio": {}}, "audio is not supported"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "low"}, "reasoning_effort is not supported"),
        ({"top_logprobs": 2}, "top_logprobs is given without logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "differ"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template, which is the model's"),
        ({"best_of": 2}, "best_of is not a field that is known"),
    ],
)
def test_fields_of_chats(server: Running, fields: dict[str, Any], says: str) -> None:
    status, _, message = refusal(server.post("/v1/chat/completions", {**CHAT, **fields}))
    assert (status, says in message) == (400, True), message


def test_fields_that_change_nothing_are_taken(server: Running) -> None:
    more = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tool_choice": "auto",
        "stream": False,
        "logprobs": False,
        "stop": None,
        "seed": None,
        "functions": None,
    }
    assert server.post("/v1/chat/completions", {**CHAT, **more}).status_code == 200


def test_messages_reach_the_chat_template(server: Running) -> None:
    """A role that the template does not know becomes "system"; parts of a content are joined."""
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "film"}]
    messages = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": parts, "name": "eve"},
        {"role": "assistant", "content": "was", "refusal": None, "annotations": []},
        {"role": "user", "content": "a"},
    ]
    answer = server.post("/v1/chat/completions", {"messages": messages, "tools": [{"a": 1}]})
    assert answer.status_code == 200
    assert server.session.requests[0].inputs == [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "the film", "name": "eve"},
        {"role": "assistant", "content": "was"},
        {"role": "user", "content": "a"},
    ]
    assert server.session.requests[0].options["tools"] == [{"a": 1}]


def test_tools_that_may_not_be_called_are_not_told(server: Running) -> None:
    body = {**CHAT, "tools": [{"a": 1}], "tool_choice": "none"}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert "tools" not in server.session.requests[0].options


@pytest.mark.parametrize(
    ("fields", "cost"),
    [
        ({}, 2),  # the default blend has two terms
        ({"model": "base"}, 2),  # which reads a row even where its weight is 0
        ({"n": 4}, 8),
        ({"prompt": ["a", "the", "film"], "best_of": 2}, 12),
        ({"blend": "base"}, 2),
        ({"blend": "base + kind + base"}, 2),
        ({"blend": "cfg(base, 2, negative_system='a')"}, 3),
        ({"blend": "base", "guidance_scale": 2.0, "negative_prompt": "a"}, 3),
        ({"lora": [{"id": 0, "scale": 1}, {"name": "kind", "scale": 2}]}, 1),
        ({"prompt": ["a", "the"], "echo": True, "logprobs": 1}, 8),
        ({"prompt": ["a", "the"], "echo": True, "logprobs": 1, "max_tokens": 0}, 4),
    ],
)
def test_what_a_request_costs(
    server: Running, fields: dict[str, Any], cost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = server.app.state.service.calls
    found = []
    opened = calls.open

    def note(prefix: str, owner: str, cost: int) -> Any:
        found.append(cost)
        return opened(prefix, owner, cost)

    monkeypatch.setattr(calls, "open", note)
    assert server.post("/v1/completions", {**TEXT, **fields}).status_code == 200
    assert found == [cost]
    assert calls.load == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n": 13}, "13 rows times 2 terms, 26; it must cost at most 24"),
        ({"prompt": ["a"] * 13}, "13 rows times 2 terms, 26"),
        ({"n": 4, "prompt": ["a"] * 4, "model": "base"}, "16 rows times 2 terms, 32"),
        ({"blend": "base + kind + cfg(base, 2, negative_system='a')"}, None),
        ({"blend": " + ".join(["cfg(base, 2, negative_system='a')"] * 2)}, "runs 4 terms; it must"),
    ],
)
def test_work_is_bounded_before_it_is_done(
    server: Running, fields: dict[str, Any], says: str | None
) -> None:
    answer = server.post("/v1/completions", {**TEXT, **fields})
    if says is None:
        assert answer.status_code == 200
        return
    status, _, message = refusal(answer)
    assert (status, says in message) == (400, True), message
    assert server.session.requests == []


def test_what_decides_and_guesses_is_named(serve: Any) -> None:
    class Judge:
        def prefer(self, contexts: Any, firsts: Any, seconds: Any) -> list[float]:
            return [0.5] * len(contexts)

    other = cf.Reward(lambda prompts, responses: [1.0] * len(responses), name="other")
    settings = Settings(
        values={"good": cf.as_value(VALUE), "other": cf.as_value(other)},
        judges={"fair": Judge()},
        limits=Limits(cost=128),
    )
    server = serve(settings=settings)

    def search(given: dict[str, Any]) -> Any:
        answer = server.post("/v1/completions", {**TEXT, "search": given, "model": "base"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["value"] == 0.5
        return server.session.requests[-1].options["search"]

    best = search({"best_of": 8, "value": "good"})
    assert (best.width, best.samples, best.chunk_length) == (8, 1, None)
    chunks = search({"width": 2, "samples": 3, "chunk_length": 7, "value": "other"})
    assert (chunks.width, chunks.samples, chunks.chunk_length) == (2, 3, 7)
    assert chunks.value is not best.value
    chunks = search({"width": 2, "value": "good"})
    assert (chunks.width, chunks.samples, chunks.chunk_length) == (2, 4, 5)
    assert isinstance(search({"tournament": 4}).judge, Judge)
    assert search({"tournament": 4, "value": "good"}).value is best.value
    refused = server.post("/v1/completions", {**TEXT, "search": {"best_of": 2}})
    assert refusal(refused)[2] == "search.value is missing; there are good, other"
    body = {**TEXT, "search": {"width": 8, "samples": 8, "value": "good"}, "n": 2}
    status, _, message = refusal(server.post("/v1/completions", body))
    assert (status, "128 rows times 2 terms" in message) == (400, True)
    drafted = server.post("/v1/completions", {**TEXT, "draft": "prompt"}).json()
    details = drafted["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == 3
    assert server.session.requests[-1].options["draft"].source == "prompt"
