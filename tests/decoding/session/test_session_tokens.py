"""The tokens of a request depend on its prompt, blend, settings and seed alone."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import crossfade as cf
import pytest
from served import FADED, PROMPT, SAMPLED, adapters, alone, apart
from sweeps import every
from tiny_models import EOS, VOCAB, make

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

KINDS: dict[str, Callable[[], dict[str, Any]]] = {"models": apart, "adapters": adapters}


def any_request(pick: random.Random) -> dict[str, Any]:
    """A request with a formula, settings and ends of its own."""
    blend = pick.choice(["base", FADED, FADED, "0.5 * base + 0.7 * x", "v * (base - y) + y"])
    faders = {f: pick.uniform(-1, 1.5) for f in "vw" if f"{f} *" in blend}
    asked: dict[str, Any] = {"blend": blend, "weights": faders, "seed": pick.randrange(2**64)}
    asked |= {"max_new_tokens": pick.randrange(1, 14), "eos_token_id": pick.choice([EOS, [1, 8]])}
    if pick.random() < 0.3:
        asked["stop_strings"] = [pick.choice("abcdefg"), pick.choice(["ah", "dn"])]
    if pick.random() < 0.8:
        asked |= {"do_sample": True, "sample": pick.choice([0, 0, 2])}
        asked |= {"temperature": pick.choice([0.5, 1.0, 1.4])}
        name, values = pick.choice([("top_k", [1, 5]), ("top_p", [0.6]), ("min_p", [0.1, 0.3])])
        asked[name] = pick.choice(values)
    return {"inputs": [pick.randrange(3, VOCAB) for _ in range(pick.randrange(1, 20))], **asked}


def given_alone(terms: dict[str, Any], request: dict[str, Any]) -> list[int]:
    rest = {name: x for name, x in request.items() if name != "inputs"}
    return alone(terms, request["inputs"], **rest).responses[request.get("sample", 0)]


@pytest.mark.parametrize("seed", every(8, range(8)))
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_else_is_served(kind: str, seed: int) -> None:
    """Three threads submit at times of their own, and take some of their requests back."""
    terms, pick = KINDS[kind](), random.Random(seed)
    each = [[any_request(random.Random(pick.random())) for _ in range(8)] for _ in range(3)]
    found: list[tuple[dict[str, Any], cf.Request]] = []

    def ask(requests: list[dict[str, Any]], own: random.Random) -> None:
        for request in requests:
            found.append((request, session.submit(**request)))
            if own.random() < 0.5:
                found[-1][1].result(30)
            if own.random() < 0.25:
                session.submit(PROMPT, blend="x", max_new_tokens=50).cancel()

    with cf.Session(terms, max_batch=5) as session:
        threads = [
            threading.Thread(target=ask, args=(r, random.Random(i))) for i, r in enumerate(each)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(found) == 24
    for request, got in found:
        assert got.result().responses == [given_alone(terms, request)], request
    assert session.stats().requests.keys() <= {"stop", "length", "cancelled"}


def test_formulas_share_a_loop() -> None:
    """A geometric formula is a vector of weights, so all of them are rows of one loop."""
    terms = apart()
    blends = ["base", FADED, "x", "2 * base - y", "y / 2 + base / 2"]
    with cf.Session(terms, weights={"w": 0.5}) as session:
        requests = [
            session.submit(PROMPT, blend=b, seed=i, **SAMPLED) for i, b in enumerate(blends)
        ]
        kinds = {r.asked.kind for r in requests}
        for i, (blend, r) in enumerate(zip(blends, requests, strict=True)):
            weights = {"w": 0.5} if blend == FADED else {}
            want = alone(terms, PROMPT, blend=blend, weights=weights, seed=i, **SAMPLED)
            assert r.result(30).responses == want.responses
    assert len(kinds) == 1


def test_constants_of_a_formula_are_a_rows_own() -> None:
    """Where formulas differ in numbers alone, and these are not weights of terms."""
    terms = apart()
    formulas = [f"base + ({u} * (x - y)).clamp(max={m})" for u, m in ((1, 1), (3, 1), (1, 2))]
    formulas += [f"power_mean([base, x], [{u}, {1 - u}], 0.5)" for u in (0.25, 0.75)]
    formulas += ["union(base, x)", "base + 2 * union(x, y)", "base + 4 * union(x, y)"]
    formulas += [f"({FADED}).within(Support(term=0, top_k={k}))" for k in (2, 9)]
    with cf.Session(terms, weights={"w": 0.5}) as session:
        requests = [session.submit(PROMPT, blend=f, seed=3, **SAMPLED) for f in formulas]
        got = [r.result(30).responses for r in requests]
    for formula, responses in zip(formulas, got, strict=True):
        faders = {"w": 0.5} if FADED in formula else {}
        want = alone(terms, PROMPT, blend=formula, weights=faders, seed=3, **SAMPLED)
        assert responses == want.responses, formula
    kinds = [r.asked.kind for r in requests]
    assert kinds[0] == kinds[1] != kinds[2], "weights of a clamp are numbers a row, its bounds not"


def spelled(prompts: list[str], texts: list[str]) -> list[float]:
    """A reward that is hardly ever the same for two texts."""
    return [sum(ord(c) / (i + 3) for i, c in enumerate(text)) for text in texts]


def other_kinds(terms: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By name: what is asked of a session, and of `alone` for the same."""
    base, reward = terms["base"], cf.Reward(spelled)
    faded: dict[str, Any] = {"blend": FADED, "weights": {"w": 0.8}}
    found = {
        name: (faded | asked, faded | asked)
        for name, asked in {
            "lookup": {"draft": cf.Draft("prompt")},
            "texts": {"draft": cf.Draft(texts=[[20, 21, 22, 23, 24, 25]])},
            "a model": {"draft": cf.Draft(make("llama", 7))},
            "base as draft": {"draft": cf.Draft(base, length=3)},
            "best of": {"search": cf.BestOfN(3, reward)},
            "chunks": {"search": cf.ChunkBeamSearch(2, 2, 4, reward)},
            "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_length": 9},
            "a second sample": {"sample": 1},
        }.items()
    }
    guided = cf.presets.cfg(base, 1.7, negative_prompt="dullfilm")
    own: dict[str, Any] = {"guidance_scale": 1.7, "negative_prompt": "dullfilm"}
    found["guidance"] = own, {"blend": guided}
    rude = {**terms, "x": replace(terms["x"], system="awful")}
    mixed = cf.parse("base + 0.5 * x", **rude)
    own = {"blend": "base + 0.5 * x", "systems": {"x": "awful"}}
    found["a system prompt"] = own, {"blend": mixed}
    if terms["x"].adapter == "x":
        lora = {"x": 0.7, "y": -0.4}
        mix = replace(terms["x"], adapter=lora)
        found["lora"] = {"lora": lora}, {"blend": mix}
        guided = cf.presets.cfg(mix, 1.7, negative_prompt="dullfilm")
        own = {"lora": lora, "guidance_scale": 1.7, "negative_prompt": "dullfilm"}
        found["lora with guidance"] = own, {"blend": guided}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_request(kind: str) -> None:
    """Each beside all others, some of which share a loop, and twice."""
    terms = KINDS[kind]()
    each = other_kinds(terms)
    settings = {**SAMPLED, "temperature": 0.9, "max_new_tokens": 10, "seed": 11}
    with cf.Session(terms, max_batch=9) as session:
        got = [
            (name, session.submit("thefilmwas", **asked, **settings))
            for _ in range(2)
            for name, (asked, _) in each.items()
        ]
        for r in [r for _, r in got]:
            r.result(60)
        assert len(session._worker.lanes) <= 4
    for name, r in got:
        want = alone(terms, "thefilmwas", **each[name][1], **settings)
        which = each[name][1].get("sample", 0)
        assert r.result().responses == [want.responses[which]], name
        assert r.result().text == [want.text[which]], name


def test_the_simple_path() -> None:
    terms, simple = apart(), cf.Engine(simple=True)
    asked = [any_request(random.Random(i)) for i in range(6)]
    asked.append({"inputs": PROMPT, "search": cf.BestOfN(2, cf.Reward(spelled)), **SAMPLED})
    with cf.Session(terms, engine=simple, tokenizer=terms["base"].tokenizer) as session:
        got = [session.submit(**request) for request in asked]
        for request, r in zip(asked[:-1], got, strict=False):
            assert r.result(30).responses == [given_alone(terms, request)]
        assert len(got[-1].result(30).responses) == 1
        with pytest.raises(ValueError, match="simple"):
            session.submit(PROMPT, draft=cf.Draft("prompt"))


def test_a_value_and_a_blend_among_the_terms() -> None:
    terms = apart()
    head = cf.ValueHead(make("llama", 9), name="q")
    named = {**terms, "q": head, "both": 0.5 * terms["x"] + 0.5 * terms["y"]}
    with cf.Session(named) as session:
        for blend, faders in (("base + v * q", {"v": 2.0}), ("both", {}), ("base + both - x", {})):
            r = session.submit(PROMPT, blend=blend, weights=faders, seed=1, **SAMPLED)
            want = alone(named, PROMPT, blend=blend, weights=faders, seed=1, **SAMPLED)
            assert r.result(30).responses == want.responses, blend


def test_two_sessions_and_a_call_over_the_same_models() -> None:
    terms = adapters()
    with cf.Session(terms) as one, cf.Session(terms) as other:
        asked = [any_request(random.Random(i)) for i in range(12)]
        got = [(r, s.submit(**r)) for r in asked for s in (one, other)]
        for request, r in got:
            assert given_alone(terms, request) == r.result(30).responses[0]


def test_a_temperature_alone_samples() -> None:
    """`generate` takes the best token unless do_sample is set, and warns; a session draws."""
    terms = apart()
    asked = {"max_new_tokens": 8, "eos_token_id": None, "seed": 3}
    with cf.Session(terms) as session:
        for given, drawn in (({"temperature": 0.9}, True), ({"top_p": 0.8}, True), ({}, False)):
            got = session.submit(PROMPT, **asked, **given).result(30)
            want = alone(terms, PROMPT, do_sample=drawn, **asked, **given)
            assert got.responses == want.responses
        greedy = session.submit(PROMPT, **asked).result(30).responses
        for given in ({"temperature": 0}, {"temperature": 0.9, "do_sample": False}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Transformers' own, of what is not used
                assert session.submit(PROMPT, **asked, **given).result(30).responses == greedy
