"""Sessions over tiny models, and what `cf.generate` gives for the same request alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import crossfade as cf
from crossfade.decoding.output import Output
from tiny_models import EOS, lora, make, make_letters

FADED = "base + w * (x - y)"
PROMPT = [7, 9, 30, 12]
SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": EOS}


def letters() -> Any:
    """A tokenizer whose texts may have stop strings, with a chat template."""
    tokenizer = make_letters()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def apart() -> dict[str, cf.Model]:
    """A base and two guides, each a model of its own."""
    tokenizer = letters()
    return {
        name: cf.Model(make("llama", seed), name=name, tokenizer=tokenizer)
        for seed, name in enumerate(("base", "x", "y"))
    }


def adapters() -> dict[str, cf.Model]:
    """A base and two guides, which are adapters of it."""
    model, tokenizer = lora(2, lora(1, make("llama", 0), "x"), "y").eval(), letters()
    return {
        "base": cf.Model(model, adapter=None, name="base", tokenizer=tokenizer),
        "x": cf.Model(model, adapter="x", name="x", tokenizer=tokenizer),
        "y": cf.Model(model, adapter="y", name="y", tokenizer=tokenizer),
    }


def alone(
    terms: dict[str, Any],
    prompt: Any,
    *,
    blend: Any = "base",
    weights: dict[str, float] | None = None,
    sample: int = 0,
    **asked: Any,
) -> Output:
    """What `cf.generate` gives for a request: its rows are the samples up to the one asked for."""
    mixed = cf.parse(blend, **terms, **(weights or {})) if isinstance(blend, str) else blend
    given = prompt if isinstance(prompt, str) or isinstance(prompt[0], dict) else [prompt]
    if sample:
        asked["num_return_sequences"] = sample + 1
    return cf.generate(mixed, given, progress=False, **asked)


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait for something that another thread is to bring about."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)
