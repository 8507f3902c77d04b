"""Steps by a tape against steps by modules: the same tokens, and how often modules run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine import backbone
from crossfade.decoding.engine.tape import instructions, step
from peft import PeftModel
from sweeps import product
from tiny_models import EOS, SHAPES, lora, make
from torch import Tensor, nn

# PEFT asks for an attribute that this version of Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

MODULES = cf.Engine(tape=False)
DRAW: dict[str, Any] = {
    "max_new_tokens": 14,
    "do_sample": True,
    "temperature": 1.3,
    "seed": 5,
    "eos_token_id": [EOS, 20, 30],
}
PROMPTS = [[7, 9, 31, 12, 8], [40], [11, 12, 13, 14, 15, 16, 17, 18, 19], [33, 6], [5, 5, 21]]


def same(ours: cf.Output, theirs: cf.Output) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4)


def both(blend: Any, inputs: Any = PROMPTS, **settings: Any) -> cf.Output:
    """What a call gives by tapes, after a check that modules give the same."""
    settings = DRAW | settings
    ours = cf.generate(blend, inputs, **settings)
    same(ours, cf.generate(blend, inputs, engine=MODULES, **settings))
    return ours


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows each forward of modules read."""
    forwards: list[int] = []
    own = backbone.forward

    def forward(body: Any, head: Any, ids: Tensor, *others: Any) -> Tensor:
        forwards.append(len(ids))
        return own(body, head, ids, *others)

    with monkeypatch.context() as patch:
        patch.setattr(backbone, "forward", forward)
        yield forwards


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_modules_run_a_few_steps(shape: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is recorded, and another one to compare with; none of a later call."""
    model = make(shape)
    inputs, settings = PROMPTS[:rows], DRAW | {"eos_token_id": None}
    expected = cf.generate(cf.Model(model), inputs, engine=MODULES, **settings)
    for steps in (2, 0):
        with counted(monkeypatch) as forwards:
            found = cf.generate(cf.Model(model), inputs, **settings)
        same(found, expected)
        assert len(forwards) == 1 + steps  # They read the prompts in one forward.
        assert not found.stats.notes


def test_a_call_gives_the_same_bits_again_and_alone() -> None:
    """A row depends neither on whether the tape was proved before nor on the other rows."""
    model = cf.Model(make("qwen3"))
    settings = DRAW | {"eos_token_id": None, "seed": None, "do_sample": False}
    first, again = (cf.generate(model, PROMPTS, **settings) for _ in range(2))
    assert torch.equal(first.logprobs, again.logprobs)
    assert torch.equal(first.sequences, again.sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    model = make("qwen3").to(dtype)
    settings = DRAW | {"max_new_tokens": 10, "eos_token_id": None}
    ours = cf.generate(cf.Model(model), PROMPTS, **settings)
    theirs = cf.generate(cf.Model(model), PROMPTS, engine=MODULES, **settings)
    alike = (ours.sequences == theirs.sequences).cumprod(-1).bool()
    assert alike.float().mean() > 0.5
    new = alike[:, -10:]
    torch.testing.assert_close(ours.logprobs[new], theirs.logprobs[new], atol=0.15, rtol=0.05)


def adapted(shape: str) -> PeftModel:
    modules = {"gpt2": ["c_attn", "c_proj"]}.get(shape, ["q_proj", "v_proj", "down_proj"])
    model: Any = make(shape)
    for seed, name in enumerate(("tuned", "ref")):
        model = lora(seed, model, name, 2 + seed, modules, fan_in_fan_out=shape == "gpt2")
    return model.eval()


def adapters(shape: str) -> Any:
    model = adapted(shape)
    base, tuned, ref = (cf.Model(model, adapter=a) for a in (None, "tuned", "ref"))
    return base + 0.7 * (tuned - ref)


def mixes(shape: str) -> Any:
    """Each request has its own mix of two adapters."""
    model = adapted(shape)
    base = cf.Model(model, adapter=None)
    mixed = cf.Model(model, adapter={"tuned": [0.1, 0.5, 0.9, 1.2, 0.0], "ref": 0.4})
    return base + 0.8 * (mixed - base)


def separate(shape: str) -> Any:
    others = [s for s in SHAPES if s != shape]
    a, b, c = (cf.Model(make(s, seed)) for seed, s in enumerate([shape, *others[:2]]))
    return a + 0.5 * (b - c)


def weighted(shape: str) -> Any:
    model = adapted(shape)
    base, tuned = (cf.Model(model, adapter=a) for a in (None, "tuned"))
    return base + torch.tensor([0.1, 0.5, 0.9, 1.2, -1.0]) * (tuned - base)


BLENDS: dict[str, Callable[[str], Any]] = {
    "adapters": adapters,
    "mixes": mixes,
    "separate": separate,
    "weighted": weighted,
}


@pytest.mark.parametrize(("shape", "blend"), product(list(SHAPES), list(BLENDS), together=1))
def test_blends(shape: str, blend: str) -> None:
    made = BLENDS[blend](shape)
    both(made)
    both(made, max_batch=2)  # Rows come and go.
    both(made, return_term_logprobs=True, return_pushes=True)


def test_long_responses_outgrow_the_first_caches() -> None:
    settings = {"max_new_tokens": 400, "eos_token_id": None}
    out = both(cf.Model(make("gemma3")), PROMPTS[:2], **settings)
    assert out.sequences.shape[1] > 400


def test_a_search_forks_rows() -> None:
    model = make("llama")
    value = cf.LogRatio(cf.Model(make("llama", 3)), cf.Model(model))
    search = cf.ChunkBeamSearch(2, 2, 3, value)
    both(cf.Model(model), search=search, max_new_tokens=15)


def test_a_cache_goes_on() -> None:
    model = cf.Model(make("qwen3"))
    settings = {"eos_token_id": None, "max_new_tokens": 9, "return_cache": True}
    first = both(model, PROMPTS[:2], **settings)
    new = first.sequences[:, first.prompt_length :].tolist()
    longer = [[*p, *ids, 9] for p, ids in zip(PROMPTS[:2], new, strict=True)]
    ours = cf.generate(model, longer, cache=first.cache, **DRAW)
    same(ours, cf.generate(model, longer, engine=MODULES, **DRAW))


def test_a_response_of_few_tokens_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a step was recorded")

    monkeypatch.setattr(step, "program_of", refuse)
    cf.generate(cf.Model(make()), PROMPTS, **(DRAW | {"max_new_tokens": step.SHORTEST - 1}))


class Wrapped(nn.Module):
    """A module of some library's, over another one."""

    __module__ = "transformers.tests"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Branch(Wrapped):
    """Looks at its numbers."""

    __module__ = "transformers.tests"

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum().item() != 0 else x


def test_a_model_that_looks_at_its_numbers_runs_as_it_is() -> None:
    model = make("llama")
    model.model.norm = Branch(model.model.norm)
    out = both(cf.Model(model, name="looks"))
    (note,) = out.stats.notes
    assert note.startswith("looks: its modules run every step: what it does depends on its numbers")


class Shy(Wrapped):
    """Gives something else while somebody records what torch is asked to do."""

    __module__ = "transformers.tests"

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1.2 if torch._C._len_torch_dispatch_stack() else 1.0)


def test_a_tape_that_gives_other_logits_is_not_used() -> None:
    model = make("llama")
    model.model.norm = Shy(model.model.norm)
    out = cf.generate(cf.Model(model, name="shy"), PROMPTS, **DRAW)
    (note,) = out.stats.notes
    assert note.startswith("shy: its modules run every step: its logits on a tape are off by")


def test_a_wrong_instruction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(instructions.RULES, "silu", instructions.RULES["sigmoid"])
    out = both(cf.Model(make("llama")))
    assert "off by" in out.stats.notes[0]


def test_what_torch_runs_is_named() -> None:
    model = make("llama")

    class Softer(Wrapped):
        __module__ = "transformers.tests"

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x.softmax(-1)

    model.model.norm = Softer(model.model.norm)
    out = both(cf.Model(model, name="soft"))
    assert out.stats.notes == ("soft: torch runs parts of each step: aten._softmax.default",)


@pytest.mark.parametrize("how", ["a class", "a forward"])
def test_forwards_of_the_callers_own_see_every_step(how: str) -> None:
    """They may do more than compute."""
    model = make("llama")
    norm, seen = model.model.norm, []

    class Own(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape)
            return self.inner(x)

    Own.__module__ = "mine"
    if how == "a class":
        model.model.norm = Own(norm)
    else:
        forward = norm.forward
        norm.forward = lambda x: (seen.append(x.shape), forward(x))[1]
    out = cf.generate(cf.Model(model, name="own"), PROMPTS[:1], **(DRAW | {"eos_token_id": None}))
    assert len(seen) >= DRAW["max_new_tokens"]
    (note,) = out.stats.notes
    assert (
        note == "own: its modules run every step: model.norm has a forward that is not its class's"
    )


def test_a_changed_model_is_proved_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    both(cf.Model(model))
    model.model.norm = Shy(model.model.norm)
    out = cf.generate(cf.Model(model), PROMPTS, **DRAW)
    assert any("off by" in n for n in out.stats.notes)


def test_changed_weights_are_read() -> None:
    model = make("llama")
    both(cf.Model(model))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-0.7)
    both(cf.Model(model))
    model.load_state_dict(make("llama", 4).state_dict(), assign=True)
    both(cf.Model(model))


def test_nothing_of_a_tape_outlives_its_model() -> None:
    model: Any = make("llama")
    made: list[Any] = []
    own = step.program_of

    def program_of(recording: Any) -> Any:
        program = own(recording)
        made.append(weakref.ref(program.arena))
        return program

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "program_of", program_of)
            cf.generate(cf.Model(model), PROMPTS, **DRAW)
        (arena,) = made
        assert arena() is not None
        del model
        assert arena() is None
    finally:
        gc.enable()
