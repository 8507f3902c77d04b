"""Programs of an earlier call: used again, for as long as all that they know is as it was."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine.tape.step import TapedStep
from tiny_models import lora, make

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's
PROMPTS = [[3, 4, 5, 6], [9, 8, 7]]
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "seed": 3, "do_sample": True}
SETTINGS["eos_token_id"] = None


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one whenever a step is recorded."""
    found: list[object] = []
    own = TapedStep._record

    def record(self: Any, *args: Any) -> Any:
        found.append(self.shape)
        return own(self, *args)

    monkeypatch.setattr(TapedStep, "_record", record)
    return found


def check(blend: Any, recorded: list[object], more: int, **settings: Any) -> None:
    """The tokens are those without a tape, and so many steps more are recorded."""
    before = len(recorded)
    got = cf.generate(blend, PROMPTS, **(SETTINGS | settings))
    assert len(recorded) - before == more
    want = cf.generate(blend, PROMPTS, engine=cf.Engine(tape=False), **(SETTINGS | settings))
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-4)
    assert torch.equal(got.sequences, want.sequences)


def test_a_model_is_recorded_once(recorded: list[object]) -> None:
    model = make("llama")
    check(model, recorded, 1)
    check(model, recorded, 0)
    check(model, recorded, 0, max_new_tokens=70)  # Its caches are larger.
    check(model, recorded, 1, num_return_sequences=2)  # More rows are another program.
    check(model, recorded, 0, num_return_sequences=2)


def test_weights_that_change(recorded: list[object]) -> None:
    model = make("llama")
    check(model, recorded, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    check(model, recorded, 0)
    for p in model.parameters():
        p.data = p.data * 0.7  # They lie elsewhere.
    check(model, recorded, 1)
    model.bfloat16()
    cf.generate(model, PROMPTS, **SETTINGS)
    assert len(recorded) == 3


def adapted() -> Any:
    return lora(2, lora(1, make("llama"), "kind"), "short")


def blend_of(model: Any) -> cf.Blend:
    each = (None, "kind", "short")
    base, kind, short = (cf.Model(model, adapter=x, name=f"of_{x}") for x in each)
    return base + 0.7 * (kind - base) + 0.5 * (short - base)


def test_adapters_that_change(recorded: list[object]) -> None:
    model = adapted()
    check(blend_of(model), recorded, 1)
    check(blend_of(model), recorded, 0)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer.lora_A["kind"].weight.data.mul_(3.0)  # No version counts this.
    check(blend_of(model), recorded, 0)
    for layer in layers:
        layer.scaling["kind"] *= 2.0
    check(blend_of(model), recorded, 1)
    lora(3, model, "wide", rank=3)  # The model has more weights now.
    base, wide = cf.Model(model, adapter=None), cf.Model(model, adapter="wide")
    check(base + 0.5 * (wide - base), recorded, 1)
    check(base + 0.9 * (wide - base), recorded, 0)


def test_mixes(recorded: list[object]) -> None:
    model = adapted()
    for more, weights in ((1, (0.3, 0.7)), (0, (0.8, 0.2))):
        mix = cf.Model(model, adapter=dict(zip(("kind", "short"), weights, strict=True)))
        check(mix, recorded, more)


def test_a_hook_that_comes(recorded: list[object]) -> None:
    model = make("llama")
    check(model, recorded, 1)
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    check(model, recorded, 0)  # It runs as it is.
    handle.remove()
    check(model, recorded, 1)


def test_calls_at_the_same_time(recorded: list[object]) -> None:
    blend, found = blend_of(adapted()), {}

    def run(i: int) -> None:
        found[i] = cf.generate(blend, PROMPTS, **(SETTINGS | {"seed": i, "max_new_tokens": 40}))

    for _ in range(2):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(3):
            want = cf.generate(blend, PROMPTS, **(SETTINGS | {"seed": i, "max_new_tokens": 40}))
            assert torch.equal(found[i].sequences, want.sequences)


def test_a_model_is_not_kept_alive() -> None:
    model = adapted()
    cf.generate(blend_of(model), PROMPTS, **SETTINGS)
    alive = weakref.ref(model.base_model.model)
    weights = weakref.ref(next(model.parameters()))
    del model
    gc.collect()
    assert alive() is None
    assert weights() is None
