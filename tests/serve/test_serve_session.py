"""The server over a real `cf.Session` of tiny models: its answers are those of `cf.generate`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade.extras import old_names
from crossfade.serve import Settings
from servers import Running, leave, running, soon
from tiny_models import EOS, lora, make, make_letters, make_tokenizer

BLEND = "base + w * (kind - base)"
PROMPT = "the film was"
SHORT = cf.Reward(lambda prompts, responses: [-len(r) for r in responses], name="short")


@pytest.fixture(scope="module")
def terms() -> dict[str, Any]:
    """Two models, of which one has two adapters."""
    tokenizer = make_tokenizer()
    with old_names():
        model = lora(2, lora(1, make(seed=0), "kind"), "brief").eval()
    options = {"base": None, "kind": "kind", "brief": "brief"}
    found = {n: cf.Model(model, adapter=a, tokenizer=tokenizer) for n, a in options.items()}
    return {**found, "other": cf.Model(make(seed=5), tokenizer=tokenizer)}


@pytest.fixture(scope="module")
def standing(terms: dict[str, Any]) -> Iterator[Running]:
    settings = Settings(values={"short": cf.as_value(SHORT)})
    with (
        cf.Session(terms, blend=BLEND, weights={"w": 0.5}, max_batch=8, max_waiting=64) as session,
        running(session, settings) as server,
    ):
        yield server


@pytest.fixture
def server(standing: Running) -> Running:
    return standing


def text(server: Running, **fields: Any) -> Any:
    answer = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 12, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def generated(terms: dict[str, Any], blend: str = BLEND, **options: Any) -> Any:
    """What `cf.generate` writes of the same prompt, drawn as the server does by default."""
    weights = options.pop("weights", {"w": 0.5} if "w" in blend else {})
    inputs = options.pop("inputs", PROMPT)
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, **options}
    return cf.generate(cf.parse(blend, **terms, **weights), inputs, **options)


def test_a_text_is_that_of_generate(server: Running, terms: dict[str, Any]) -> None:
    out = generated(terms, seed=7)
    found = text(server, seed=7, logprobs=0)
    assert found["text"] == out.text[0]
    assert found["logprobs"]["token_logprobs"] == pytest.approx(out.logprobs[0].tolist(), abs=1e-5)
    assert found["finish_reason"] == ("stop" if out.finished[0] else "length")
    greedy = generated(terms, "other", do_sample=False)
    assert text(server, model="other", temperature=0)["text"] == greedy.text[0]
    drawn = generated(terms, seed=3, temperature=0.5, top_p=0.7)
    assert text(server, seed=3, temperature=0.5, top_p=0.7)["text"] == drawn.text[0]


def test_samples_are_those_of_generate(server: Running, terms: dict[str, Any]) -> None:
    out = generated(terms, seed=7, num_return_sequences=3)
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 7, "n": 3}
    choices = server.post("/v1/completions", body).json()["choices"]
    assert [c["text"] for c in choices] == out.text


def test_a_chat_is_that_of_generate(server: Running, terms: dict[str, Any]) -> None:
    chat = [{"role": "system", "content": "very dull"}, {"role": "user", "content": PROMPT}]
    out = generated(terms, inputs=[chat], seed=7)
    body = {"messages": chat, "max_tokens": 12, "seed": 7}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["content"] == out.text[0]
    assert answer["usage"]["prompt_tokens"] == out.prompt_length
    assert answer["usage"]["completion_tokens"] == out.lengths[0]
    whole = ""
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as s:
        for line in s.iter_lines():
            if line.startswith("data: {"):
                whole += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    assert whole == out.text[0]


def test_requests_with_different_blends_at_once_are_what_each_is_alone(
    server: Running, terms: dict[str, Any]
) -> None:
    each = [
        {"weights": {"w": 0.1 * i}, "seed": i, "temperature": 0.5 + 0.1 * (i % 3)}
        for i in range(10)
    ]
    each += [{"blend": f, "seed": 1} for f in ("base", "0.5 * kind + 0.5 * other", "brief - kind")]
    with ThreadPoolExecutor(len(each)) as pool:
        together = [*pool.map(lambda fields: text(server, **fields)["text"], each)]
    for fields, found in zip(each, together, strict=True):
        assert found == generated(terms, **fields).text[0]


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(serve: Any) -> None:
    term = cf.Model(make(seed=5), tokenizer=make_letters())
    with cf.Session({"base": term}) as session:
        server = serve(session)
        whole = text(server, prompt="abc", seed=7, max_tokens=40)["text"]
        stop = next(whole[i : i + 3] for i in range(5, 30) if whole.find(whole[i : i + 3]) == i)
        for stream in (False, True):
            body = {"prompt": "abc", "seed": 7, "max_tokens": 40, "stop": stop, "stream": stream}
            answer = server.post("/v1/completions", body).text
            parts = answer.split("\n\n")[:-2] if stream else [answer]
            choices = [json.loads(part.removeprefix("data: "))["choices"][0] for part in parts]
            assert "".join(c["text"] for c in choices) == whole[: whole.index(stop)]
            assert choices[-1]["finish_reason"] == "stop"
        server.close()


def test_figures_are_those_of_generate(server: Running, terms: dict[str, Any]) -> None:
    out = generated(terms, seed=7, return_term_logprobs=True, return_kl_to_base=True)
    asked = {"return_term_logprobs": True, "return_kl_to_base": True, "return_pushes": True}
    found = text(server, seed=7, **asked)
    parsed = cf.parse(BLEND, **terms, w=0.5)
    for name, column in zip(parsed.names, out.term_logprobs[0].T, strict=True):
        told = [x[name] for x in found["term_logprobs"]]
        assert told == pytest.approx(column.tolist(), abs=1e-4)
    assert found["kl_to_base"] == pytest.approx(out.kl_to_base[0].tolist(), abs=1e-4)
    pushed = generated(terms, seed=7, return_pushes=True).pushes[0, :, 1:].sum(dim=1)
    assert [x["w"] for x in found["pushes"]] == pytest.approx(pushed.tolist(), abs=1e-4)


def test_the_likeliest_tokens_are_told(server: Running) -> None:
    found = text(server, temperature=0, logprobs=3)["logprobs"]
    for own, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) == 3
        assert own == max(top.values())


def test_a_prompt_is_scored_as_by_score(server: Running, terms: dict[str, Any]) -> None:
    blend = cf.parse(BLEND, **terms, w=0.9)
    prompts = [[11, 10, 13, 8, 9], [12, 13], [9], [20, 21, 22]]
    scores = cf.score(blend, [p[:1] for p in prompts], [p[1:] or [EOS] for p in prompts])
    body = {"prompt": prompts, "weights": {"w": 0.9}, "echo": True, "logprobs": 1}
    for most in (0, 1):
        choices = server.post("/v1/completions", {**body, "max_tokens": most}).json()["choices"]
        for i, (prompt, choice) in enumerate(zip(prompts, choices, strict=True)):
            told = choice["logprobs"]["token_logprobs"]
            assert len(told) == len(prompt) + most
            assert told[0] is None
            n = len(prompt) - 1
            assert told[1 : n + 1] == pytest.approx(scores.logprobs[i, :n].tolist(), abs=1e-5)
            tops = choice["logprobs"]["top_logprobs"][1 : n + 1]
            greedy = [x == max(t.values()) for x, t in zip(told[1:], tops, strict=False)]
            assert greedy == (scores.ranks[i, :n] == 0).tolist()


def test_faders_move_from_the_next_token_on(server: Running, terms: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 400, "stream": True, "logit_bias": {str(EOS): -100}}
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = (line[6:] for line in stream.iter_lines() if line)
        id = json.loads(next(lines))["id"]
        moved = server.post(f"/v1/requests/{id}/weights", {"weights": {"w": -1.0}}).json()
        (changes,) = moved["changes"]
        *_, last = (json.loads(line) for line in lines if line != "[DONE]")
    assert last["choices"][0]["changes"] == changes
    assert changes[0]["weights"] == {"w": -1.0}
    assert 0 < changes[0]["tokens"] < 400


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_place(server: Running, stream: bool) -> None:
    body = {"prompt": PROMPT, "max_tokens": 480, "stream": stream, "logit_bias": {str(EOS): -100}}
    before = server.session.stats()
    leave(server, {**body, "n": 8}, lambda: server.session.running == 8)
    soon(lambda: server.session.running == 0)
    soon(lambda: server.app.state.service.calls.load == 0)
    after = server.session.stats()
    assert after.requests["cancelled"] - before.requests.get("cancelled", 0) == 8
    assert after.tokens - before.tokens < 8 * 480
    assert text(server)["text"]


def test_extensions_do_what_they_do_in_generate(server: Running, terms: dict[str, Any]) -> None:
    base = terms["base"]
    guided = cf.presets.cfg(base, 2.0, negative_prompt="dull")
    out = cf.generate(guided, PROMPT, max_new_tokens=12, do_sample=False)
    fields = {"blend": "base", "guidance_scale": 2.0, "negative_prompt": "dull"}
    assert text(server, temperature=0, **fields)["text"] == out.text[0]

    mixed = cf.Model(base.model, adapter={"kind": 0.7, "brief": 0.3}, tokenizer=base.tokenizer)
    out = cf.generate(mixed, PROMPT, max_new_tokens=12, do_sample=False)
    mix = [{"id": 1, "scale": 0.7}, {"name": "brief", "scale": 0.3}]
    assert text(server, temperature=0, lora=mix)["text"] == out.text[0]

    best = generated(terms, "other", seed=3, search=cf.BestOfN(4, SHORT))
    found = text(server, model="other", seed=3, search={"best_of": 4})
    assert found["text"] == best.text[0]
    assert found["value"] == float(best.values[0])

    system = cf.Model(base.model, adapter=None, tokenizer=base.tokenizer, system="very dull")
    chat = [{"role": "user", "content": PROMPT}]
    out = cf.generate(system, [chat], max_new_tokens=12, do_sample=False)
    body = {"messages": chat, "systems": {"base": "very dull"}, "blend": "base", "temperature": 0}
    answer = server.post("/v1/chat/completions", {**body, "max_tokens": 12}).json()
    assert answer["choices"][0]["message"]["content"] == out.text[0]


def test_drafts_change_no_token_and_are_counted(server: Running, terms: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 40, "seed": 7, "logit_bias": {str(EOS): -100}}
    plain = text(server, **body)
    prediction = {"type": "content", "content": plain["text"]}
    for draft in ({"draft": "prompt"}, {"prediction": prediction}):
        answer = server.post("/v1/completions", {**body, **draft}).json()
        assert answer["choices"][0]["text"] == plain["text"]
    details = answer["usage"]["completion_tokens_details"]
    each = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
    assert sum(each) == 40  # On so small a model guesses may not pay, and then none is made.


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": [8] * 600}, "prompt", "prompt cannot be decoded: its prompt has 600 tokens"),
        ({"prompt": [61]}, "prompt", "prompt has id 61"),
        ({"prompt": ""}, "prompt", "prompt has no tokens"),
        ({"weights": {"v": 1.0}}, "weights", "weights has 'v', which is not in"),
        ({"weights": {"kind": 1.0}}, "weights", "which is a term"),
        ({"blend": "base + v * kind"}, "blend", "unknown name 'v'"),
        ({"blend": "base * kind"}, "blend", "blend: "),
        ({"systems": {"knid": "a"}}, "systems", "did you mean 'kind'?"),
        ({"lora": [{"name": "other", "scale": 1.0}]}, "lora", "adapters: kind, brief"),
        ({"search": {"best_of": 9}}, "search", "search has 9 rows; it must have at most"),
        ({"guidance_scale": 2.0}, "negative_prompt", "negative_prompt is None"),
        ({"logit_bias": {"99": 1.0}}, None, "99"),
    ],
)
def test_what_the_session_refuses_is_named(
    server: Running, fields: dict[str, Any], param: str | None, says: str
) -> None:
    answer = server.post("/v1/completions", {"prompt": PROMPT, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert says in error["message"]


def test_tools_that_no_template_reads_are_refused(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = server.post("/v1/chat/completions", {**body, "tools": tools})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = server.post("/v1/chat/completions", {**body, **kwargs})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_figures_of_the_session_are_told(server: Running) -> None:
    text(server)
    lines = dict(
        x.rsplit(" ", 1) for x in server.http.get("/metrics").text.splitlines() if x[0] != "#"
    )
    assert float(lines["crossfade_session_tokens"]) > 0
    assert float(lines['crossfade_session_requests{reason="length"}']) > 0
    assert lines["crossfade_alive"] == "1.0"


def test_a_queue_that_is_full_says_so(terms: dict[str, Any], serve: Any) -> None:
    with cf.Session({"base": terms["other"]}, max_batch=1, max_waiting=1) as session:
        server = serve(session)
        body = {"prompt": PROMPT, "max_tokens": 480, "logit_bias": {str(EOS): -100}, "stream": True}
        with (
            server.http.stream("POST", "/v1/completions", json=body) as first,
            server.http.stream("POST", "/v1/completions", json=body) as second,
        ):
            assert first.status_code == second.status_code == 200
            refused = server.post("/v1/completions", body)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        server.close()


def test_an_engine_that_dies_tells_everybody(
    terms: dict[str, Any], serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = cf.Session({"base": terms["other"]})
    server = serve(session)
    body = {"prompt": PROMPT, "max_tokens": 480, "logit_bias": {str(EOS): -100}, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)

        def dies() -> None:
            raise SystemError("the thread dies")

        monkeypatch.setattr(session._worker, "step", dies)
        *_, error, done = lines
    assert json.loads(error[6:])["error"]["code"] == "engine_dead"
    assert done == "data: [DONE]"
    assert server.http.get("/health").status_code == 503
    assert server.post("/v1/completions", {"prompt": PROMPT}).status_code == 503


# ---- The evaluation harness ---------------------------------------------------------------------


def test_the_harness_gets_the_log_likelihoods_of_score(
    server: Running, terms: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = pytest.importorskip("lm_eval.models.openai_completions")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance

    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = api.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="crossfade",
        tokenizer=str(tmp_path),
        tokenizer_backend="huggingface",
        batch_size=3,
    )
    pairs = [
        ("the film was", " great"),
        ("the film was", " awful dull"),
        ("a very bright plot", " the cast"),
        ("dull", " film the a"),
        ("the cast was great", " very very"),
    ]
    tokenizer = make_tokenizer()
    encoded = [[tokenizer(x, add_special_tokens=False)["input_ids"] for x in p] for p in pairs]
    blend = cf.parse(BLEND, **terms, w=0.5)
    scores = cf.score(blend, [c for c, _ in encoded], [a for _, a in encoded])
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]
    found = lm.loglikelihood(asked)
    assert [x for x, _ in found] == pytest.approx(scores.totals.tolist(), abs=1e-4)
    assert [g for _, g in found] == scores.greedy.tolist()
