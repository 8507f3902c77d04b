"""What runs beside a decode over the same model, in other threads and inside of it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import ops
from tiny_models import EOS, lora, make
from torch import nn
from transformers import LogitsProcessor

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SIMPLE = cf.Engine(simple=True)
MODULES = cf.Engine(tape=False)  # a tape would not see what is put into a model
DRAW: dict[str, Any] = {
    "max_new_tokens": 8,
    "do_sample": True,
    "seed": 5,
    "eos_token_id": EOS,
    "progress": False,
}
PROMPTS = [[7, 9, 30], [8, 9], [5, 40, 41, 42]]
IDS = torch.tensor([[5, 6, 7, 8]])


@contextmanager
def inside(module: nn.Module, act: Callable[[], Any], engine: Any) -> Iterator[list[Any]]:
    """Run `act` in the middle of every forward of a decode, but not of its own forwards."""
    found: list[Any] = []
    acting = False

    def hook(*_: Any) -> None:
        nonlocal acting
        if not acting:
            acting = True
            try:
                found.append(act())
            finally:
                acting = False

    hook.__module__ = "crossfade"  # A model with a caller's hook would take the simple path.
    if engine is SIMPLE:
        handle = module.register_forward_hook(hook)
        try:
            yield found
        finally:
            handle.remove()
        return
    attend = ops.attend_  # The engine would not run a model with a hook.

    def acting_first(*args: Any, **kwargs: Any) -> Any:
        hook()
        return attend(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ops, "attend_", acting_first)
        yield found


def in_a_thread(act: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join(timeout=60)
    assert found, "it ended, and without an error"
    return found[0]


NAMES = ("one model", "learned positions", "adapters")


def blends() -> dict[str, Any]:
    """A model and a blend over it, by `NAMES`."""
    adapted = lora(2, lora(1, make("llama"), "tuned"), "ref")
    terms = [cf.Model(adapted, adapter=a) for a in (None, "tuned", "ref")]
    return {
        "one model": (make("llama"), lambda m: cf.Model(m)),
        "learned positions": (make("gpt2"), lambda m: cf.Model(m)),
        "adapters": (adapted, lambda m: terms[0] + 0.7 * (terms[1] - terms[2])),
    }


@pytest.mark.parametrize("engine", [MODULES, SIMPLE], ids=["engine", "simple"])
@pytest.mark.parametrize("name", NAMES)
def test_a_forward_beside_a_decode_is_the_models_own(name: str, engine: Any) -> None:
    """This holds also in the middle of a forward of the decode, while its adapters are on."""
    model, blend = blends()[name]
    own = model(IDS).logits
    tokens = model.generate(IDS, max_new_tokens=4, pad_token_id=0)
    whole = cf.generate(blend(model), PROMPTS, engine=engine, **DRAW)
    layers = [m for m in model.modules() if type(m).__name__ in ("LlamaMLP", "GPT2MLP")]

    def beside() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = model(IDS).logits
        return logits, model.generate(IDS, max_new_tokens=4, pad_token_id=0)

    for act in (beside, lambda: in_a_thread(beside)):
        with inside(layers[1], act, engine) as found:
            out = cf.generate(blend(model), PROMPTS, engine=engine, **DRAW)
        assert len(found) >= 8
        for logits, generated in found:
            torch.testing.assert_close(logits, own)
            assert torch.equal(generated, tokens)
        assert torch.equal(out.sequences, whole.sequences)
        torch.testing.assert_close(out.logprobs, whole.logprobs)


@pytest.mark.parametrize("engine", [None, SIMPLE], ids=["engine", "simple"])
def test_a_decode_inside_a_decode(engine: Any) -> None:
    """Functions of the caller may decode over the same models, and nothing is locked."""
    model, blend = blends()["adapters"]
    blend = blend(model)
    whole = cf.generate(blend, PROMPTS, engine=engine, **DRAW)
    calls = iter(range(10**6))

    def again() -> None:
        if next(calls) % 4:
            return
        inner = cf.generate(blend, PROMPTS, engine=engine, **DRAW)
        assert torch.equal(inner.sequences, whole.sequences)
        assert cf.score(blend, PROMPTS, whole.responses).logprobs.isfinite().all()

    class Calls(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            again()
            return scores

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            again()

        def end(self) -> None:
            again()

    for arguments in ({"logits_processor": [Calls()]}, {"streamer": Streamer()}):
        out = cf.generate(blend, PROMPTS, engine=engine, **arguments, **DRAW)
        assert torch.equal(out.sequences, whole.sequences)


def test_two_decodes_over_one_model() -> None:
    """Each thread gets the tokens that it gets alone, in whatever order its blend names models."""
    first, (second, adapters) = make("gpt2"), blends()["adapters"]
    here = adapters(second) + 0.3 * cf.Model(first)
    there = cf.Model(first) + 0.5 * cf.Model(second, adapter="ref")
    other = cf.Model(second, adapter="tuned")
    jobs = [(here, None), (there, None), (other, SIMPLE), (there, SIMPLE)]
    alone = [cf.generate(b, PROMPTS, engine=e, **DRAW).sequences for b, e in jobs]
    found: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(jobs))}

    def work(i: int) -> None:
        blend, engine = jobs[i]
        for _ in range(3):
            found[i].append(cf.generate(blend, PROMPTS, engine=engine, **DRAW).sequences)

    threads = [threading.Thread(target=work, args=(i,)) for i in found]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=120)
    for i, each in found.items():
        assert len(each) == 3
        assert all(torch.equal(x, alone[i]) for x in each)


@pytest.mark.parametrize("engine", [MODULES, SIMPLE], ids=["engine", "simple"])
def test_adapters_switched_beside_a_decode(engine: Any) -> None:
    """The adapter that is active when a call starts is used for the whole call."""
    model = lora(2, lora(1, make("llama"), "tuned"), "ref")
    model.set_adapter("tuned")
    whole = cf.generate(model, PROMPTS, engine=engine, **DRAW)
    layer = next(m for m in model.modules() if type(m).__name__ == "LlamaMLP")
    with inside(layer, lambda: model.set_adapter("ref"), engine):
        out = cf.generate(model, PROMPTS, engine=engine, **DRAW)
    assert torch.equal(out.sequences, whole.sequences)
    assert model.active_adapter == "ref"
    other = cf.generate(model, PROMPTS, engine=engine, **DRAW)
    assert not torch.equal(other.sequences, out.sequences)


@pytest.mark.parametrize("engine", [MODULES, SIMPLE], ids=["engine", "simple"])
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupt_anywhere_leaves_no_trace(name: str, engine: Any) -> None:
    model, blend = blends()[name]
    before = [dict(vars(m)) for m in model.modules()]
    for at in (0, 1, 4):
        calls = iter(range(10**6))

        def interrupt(at: int = at, calls: Iterator[int] = calls) -> None:
            if next(calls) == at:
                raise KeyboardInterrupt

        layer = next(m for m in model.modules() if "MLP" in type(m).__name__)
        with (
            inside(layer, interrupt, engine),
            pytest.warns(RuntimeWarning, match="interrupted when"),
        ):
            cf.generate(blend(model), PROMPTS, engine=engine, **DRAW)
        after = [dict(vars(m)) for m in model.modules()]
        assert all(a.keys() == b.keys() for a, b in zip(after, before, strict=True))
        assert all(x[k] is y[k] for x, y in zip(after, before, strict=True) for k in x)


def test_hooks_see_the_model_itself() -> None:
    """A hook that compares modules, or keeps something in one, finds the model's own."""
    model = make("llama")
    seen = []

    def hook(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        module.seen = output  # type: ignore[assignment]
        seen.append(module)

    layer = model.model.layers[0].mlp
    handle = layer.register_forward_hook(hook, with_kwargs=True)
    cf.generate(model, PROMPTS, **DRAW)
    handle.remove()
    assert set(seen) == {layer}
    assert isinstance(layer.seen, torch.Tensor)


@pytest.mark.parametrize("kind", ["method", "partial", "closure"])
def test_forwards_that_somebody_put_into_a_model(kind: str) -> None:
    """They run the modules that they were made of, under the adapter of the term."""
    plain = lora(2, lora(1, make("llama"), "tuned"), "ref")
    patched = lora(2, lora(1, make("llama"), "tuned"), "ref")
    for layer in patched.get_base_model().model.layers:
        own, mlp = layer.mlp.forward, layer.mlp
        if kind == "method":
            mlp.forward = own
        elif kind == "partial":
            mlp.forward = functools.partial(lambda module, x: type(module).forward(module, x), mlp)
        else:
            mlp.forward = _closing_over(own)
    patched.set_adapter("ref")
    for engine in (None, SIMPLE):
        ours, theirs = (
            cf.generate(
                cf.Model(m, adapter="tuned") - 0.5 * cf.Model(m, adapter=None),
                PROMPTS,
                engine=engine,
                **DRAW,
            )
            for m in (patched, plain)
        )
        assert torch.equal(ours.sequences, theirs.sequences)


def _closing_over(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return own(x)

    return forward
