"""What users put on a model: hooks, other forwards, parametrizations, compiled modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from strange_models import NEW, PROMPTS, alone, check
from tiny_models import make
from torch import Tensor, nn

# PEFT asks for an attribute that this version of Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def on_last(module: Any, args: Any, output: Any) -> Any:
    """A hook that steers the last token which is read."""
    hidden = output[0] if isinstance(output, tuple) else output
    hidden[:, -1] += 2.0
    return output


def doubled(module: Any, args: Any, output: Any) -> Any:
    output.logits = -2 * output.logits
    return output


HOOKS: dict[str, Callable[[Any], Any]] = {
    "the head": lambda m: m.lm_head.register_forward_hook(lambda h, a, out: -2 * out),
    "before the head": lambda m: m.lm_head.register_forward_pre_hook(lambda h, a: (-a[0],)),
    "the model": lambda m: m.register_forward_hook(doubled),
    "a linear layer": lambda m: m.model.layers[1].mlp.up_proj.register_forward_hook(
        lambda h, a, out: out + 3
    ),
    "before a linear layer": lambda m: m.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda h, a: (a[0] * 3,)
    ),
    "a layer": lambda m: m.model.layers[0].register_forward_hook(on_last),
    "with keywords": lambda m: m.model.layers[0].self_attn.register_forward_pre_hook(
        lambda h, a, k: (a, {**k, "hidden_states": -k["hidden_states"]}), with_kwargs=True
    ),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_are_called_as_generate_calls_them(hook: Callable[[Any], Any]) -> None:
    model = make("llama")
    before = alone(model)
    handle = hook(model)
    assert alone(model) != before
    check(model, "has a forward hook")
    handle.remove()
    check(model, None)


class Counter:
    """A hook that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: Any, args: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output if self.calls < 4 else -output


def test_a_hook_that_counts_is_called_once_a_forward() -> None:
    model, (prompt, *_) = make("llama"), PROMPTS
    ids = torch.tensor([prompt])
    with model.lm_head.register_forward_hook(Counter()):
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW)
    with model.lm_head.register_forward_hook(Counter()):
        out = cf.generate(model, [prompt], max_new_tokens=NEW)
    assert torch.equal(out.sequences, theirs)
    assert theirs[0, len(prompt) :].tolist() != alone(model)[0]


def test_hooks_on_all_modules_are_called() -> None:
    model = make("llama")

    def negated(module: Any, args: Any, output: Any) -> Any:
        return -output if type(module) is nn.Linear else None

    handle = nn.modules.module.register_module_forward_hook(negated)
    try:
        check(model, "all modules have a forward hook")
    finally:
        handle.remove()
    check(model, None)


def test_hooks_of_libraries_keep_the_engine() -> None:
    """Gradient checkpointing and outputs of Transformers need hooks of their own."""
    model = make("llama")
    model.enable_input_require_grads()
    model(torch.tensor([[5]]), output_hidden_states=True)
    check(model, None)


class Negated(nn.Module):
    """A parametrization that negates a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return -weight


def parametrized(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(
        model.model.layers[0].mlp.up_proj, "weight", Negated()
    )


def last_negated(model: Any) -> None:
    """Give an MLP a forward that changes the last token which it is given."""
    mlp = model.model.layers[0].mlp
    own = mlp.forward

    def forward(x: Tensor) -> Tensor:
        out = own(x).clone()
        out[:, -1] *= -3
        return out

    mlp.forward = forward


def fewer_arguments(model: Any) -> None:
    """Give a model a forward that takes what `generate` gives it, and no more."""
    own = model.forward

    @functools.wraps(own)
    def forward(
        input_ids: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        return_dict: Any = None,
        position_ids: Any = None,
        logits_to_keep: int = 0,
    ) -> Any:
        out = own(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_ids=position_ids,
        )
        out.logits = -out.logits
        return out

    model.forward = forward


REPLACED: dict[str, tuple[Callable[[Any], None], str | None]] = {
    "parametrized": (parametrized, None),
    "a forward of one module": (last_negated, "not its own"),
    "a forward of the model": (fewer_arguments, "TypeError"),
}


@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED)
def test_modules_that_somebody_changed(change: tuple[Callable[[Any], None], str | None]) -> None:
    model = make("llama")
    check(model, None)  # What is found now must not count after the change.
    before = alone(model)
    change[0](model)
    assert alone(model) != before
    check(model, change[1])


def test_a_forward_of_all_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    check(model, None)
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: -0.5 * own(self, x))
    check(model, None)  # The engine leaves linear layers to torch then.


COMPILED: dict[str, Callable[[Any], Any]] = {
    "a module": lambda m: setattr(
        m.model.layers[0], "mlp", torch.compile(m.model.layers[0].mlp, backend="eager")
    ),
    "its forward": lambda m: setattr(m, "forward", torch.compile(m.forward, backend="eager")),
}


@pytest.mark.parametrize("change", COMPILED.values(), ids=COMPILED)
def test_compiled_modules_run_as_they_are(change: Callable[[Any], Any]) -> None:
    model = make("llama")
    theirs = alone(model)
    change(model)
    out = cf.generate(model, PROMPTS[:1], max_new_tokens=3)
    assert out.responses == [theirs[0][:3]]
    assert "is compiled" in out.stats.notes[0]


def test_models_compiled_in_place_keep_the_engine() -> None:
    """Only the forward of the model itself is compiled, and the engine does not call that."""
    model = make("llama")
    theirs = alone(model)
    model.compile(backend="eager")
    model.model.layers[0].mlp.compile(backend="eager")
    out = cf.generate(model, PROMPTS[:1], max_new_tokens=3)
    assert out.responses == [theirs[0][:3]]
    assert out.stats.notes == ()
