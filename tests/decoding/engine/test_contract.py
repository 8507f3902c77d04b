"""Whatever a layer asks of attention, and whatever else a model does, decoding honours it.

Each model here does something that the engine's attention, kernels or caches do not know. Then it
runs on the simple path, a note says why, and it writes what `model.generate` writes for each row
alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine import contract
from crossfade.decoding.simple import structure
from tiny_models import EOS, HEADS, IDS, LONG, SHAPES, SIZES, UNTIED, lora, make
from torch import Tensor, nn
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    LlamaForSequenceClassification,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

# PEFT asks transformers for an attribute that this version of it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PROMPTS = [[5, 9, 13, 21, 7, 40, 33, 12, 28], [17, 23, 42, 8, 50], [31]]
NEW = 10


def alone(model: Any, **options: Any) -> list[list[int]]:
    """What `model.generate` writes for each prompt."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
        row = out[0, len(prompt) :].tolist()
        found.append(row[: row.index(EOS) + 1] if EOS in row else row)
    return found


def check(model: Any, why: str | None) -> None:
    """Tokens are Hugging Face's, and `why` is in the note; None: the engine runs the model."""
    theirs = alone(model)
    out = cf.generate(model, PROMPTS, max_new_tokens=NEW)
    assert out.responses == theirs
    if why is None:
        assert out.stats.notes == ()
    else:
        (note,) = out.stats.notes
        assert note.startswith("the simple path: ")
        assert why in note


class Strange(modeling_llama.LlamaAttention):
    """Llama's attention, whose call is left to `attend`."""

    def attend(
        self, call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any
    ) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **given: Any,
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            layer(hidden_states).view(shape).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )

        def call(*tensors: Any, **more: Any) -> Tensor:
            every = {"dropout": 0.0, "scaling": self.scaling, **given, **more}
            return interface(self, *tensors, **every)[0]

        out = self.attend(call, q, k, v, attention_mask)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def distances(q: Tensor, k: Tensor) -> Tensor:
    """``[q, k]``: how far each query's token is after each key's."""
    at = torch.arange(k.shape[2])
    return at[-q.shape[2] :, None] - at


def seen(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """``[rows, 1, q, k]``: what Llama lets each query's token see."""
    causal = (distances(q, k) >= 0).expand(len(q), 1, -1, -1)
    return causal if mask is None else causal & mask


class Biased(Strange):
    """ALiBi, in the mask that it hands to attention."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        bias = (-0.7 * distances(q, k)).masked_fill(~seen(q, k, mask), -torch.inf)
        return call(q, k, v, bias)


class Sparse(Strange):
    """Looks at every other token alone."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return call(q, k, v, seen(q, k, mask) & (distances(q, k) % 2 == 0))


class Named(Strange):
    """Hands on an argument that the engine knows nothing of."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return call(q, k, v, mask, slopes=torch.ones(2))


class Twice(Strange):
    """The difference of two attentions, as in DiffLlama."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return call(q, k, v, mask) - 0.5 * call(q, k, -v.flip(1), mask)


class Memory(Strange):
    """Keys and values of its own before those of the tokens."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        allowed = nn.functional.pad(seen(q, k, mask), (1, 0), value=True)
        k, v = (torch.cat([torch.ones_like(x[:, :, :1]), x], dim=2) for x in (k, v))
        return call(q, k, v, allowed)


class Counting(Strange):
    """Scales queries by how many keys there are, which the engine's caches hold."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return call(q * (k.shape[2] + 1.0), k, v, mask)


class Shifted(Strange):
    """Adds to each token the one before it, if that is in the same forward."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        before = torch.cat([torch.zeros_like(q[:, :, :1]), q[:, :, :-1]], dim=2)
        return call(q + before, k, v, mask)


class Acausal(Strange):
    """Says that it looks at all of a text."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return call(q, k, v, seen(q, k, mask), is_causal=False)


STRANGE = {
    Biased: "masks of their own",
    Sparse: "masks of their own",
    Named: "uses slopes",
    Twice: "more than once",
    Memory: "over tensors of the shapes",
    Counting: "not its own",
    Shifted: "not its own",
    Acausal: "masks of their own",
}


def strange(kind: type[Strange], model: PreTrainedModel | None = None) -> PreTrainedModel:
    model = model or make("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model


@pytest.mark.parametrize("kind", STRANGE, ids=lambda kind: kind.__name__)
def test_what_attention_does_not_know(kind: type[Strange]) -> None:
    check(strange(kind), STRANGE[kind])


def family(config: Any, model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    made = model(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def diff_llama() -> PreTrainedModel:
    heads = {**HEADS, "num_key_value_heads": 2}
    return family(DiffLlamaConfig(**SIZES, **heads, **LONG, **IDS), DiffLlamaForCausalLM)


def doge() -> PreTrainedModel:
    return family(DogeConfig(**SIZES, **HEADS, **LONG, **IDS, **UNTIED), DogeForCausalLM)


def phimoe(window: int = 9) -> PreTrainedModel:
    """A window that is in the mask alone."""
    config = PhimoeConfig(
        **SIZES, **HEADS, **LONG, **IDS, sliding_window=window, num_local_experts=2
    )
    return family(config, PhimoeForCausalLM)


def kept_short(window: int = 9) -> PreTrainedModel:
    """A window that only the cache knows of, as in Moshi; longer than the check's tokens."""
    model = make("llama")
    model.config.sliding_window = window
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (diff_llama, "more than once"),
        (doge, "masks of their own"),
        (phimoe, "of which its layers do not know"),
        (kept_short, "its cache keeps 9 tokens"),
    ],
)
def test_families_that_attend_in_other_ways(model: Any, why: str) -> None:
    check(model(), why)


@pytest.mark.parametrize("model", [phimoe, kept_short])
def test_up_to_its_window_such_a_model_stays_on_the_engine(model: Any) -> None:
    made = model(30)
    check(made, None)
    longer = [PROMPTS[0] * 3]
    out = cf.generate(made, longer, max_new_tokens=NEW)
    assert "its cache keeps 30 tokens" in out.stats.notes[0]
    theirs = made.generate(torch.tensor(longer), max_new_tokens=NEW)
    assert torch.equal(out.sequences[:, : theirs.shape[1]], theirs)


def test_how_far_a_layer_looks_is_asked_of_its_mask() -> None:
    """Up to how many tokens a mask is what the layer says that it is."""
    layer = make("gemma3").model.layers[0].self_attn
    layer.config.sliding_window = 300

    def windowed(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (k > q - 300)

    def chunked(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (k // 300 == q // 300)

    def table(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return torch.zeros(3)[q] == torch.zeros(3)[k]

    for function, window, expected in (
        (windowed, 300, None),
        (windowed, 0, 300),
        (windowed, 200, 200),
        (chunked, 300, 300),
        (lambda b, h, q, k: k <= q, 0, None),
        (lambda b, h, q, k: k <= q, 300, 300),
        (lambda b, h, q, k: k <= q + 1, 0, 0),
        (table, 0, 0),
    ):
        assert contract._causal_up_to(function, window, layer) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_runs_what_it_knows(shape: str) -> None:
    check(make(shape), None)


# What users put on a model: hooks, other forwards, parametrizations.


def on_last(module: Any, args: Any, output: Any) -> Any:
    """Steering, of the last token that is read."""
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
    """The hooks that gradient checkpointing and Transformers' own outputs need."""
    model = make("llama")
    model.enable_input_require_grads()
    model(torch.tensor([[5]]), output_hidden_states=True)
    check(model, None)


class Negated(nn.Module):
    """A parametrization of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return -weight


def parametrized(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(
        model.model.layers[0].mlp.up_proj, "weight", Negated()
    )


def last_negated(model: Any) -> None:
    """An MLP whose forward changes the last token that it is given."""
    mlp = model.model.layers[0].mlp
    own = mlp.forward

    def forward(x: Tensor) -> Tensor:
        out = own(x).clone()
        out[:, -1] *= -3
        return out

    mlp.forward = forward


def fewer_arguments(model: Any) -> None:
    """A model whose forward takes what `generate` gives it, and no more."""
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
    check(model, None)  # what is found now must not count once the model is changed
    before = alone(model)
    change[0](model)
    assert alone(model) != before
    check(model, change[1])


def test_a_forward_of_all_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    check(model, None)
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: -0.5 * own(self, x))
    check(model, None)  # the engine leaves linear layers to torch then


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
    """Only their own forward is compiled, which the engine does not call: it has its kernels."""
    model = make("llama")
    theirs = alone(model)
    model.compile(backend="eager")
    model.model.layers[0].mlp.compile(backend="eager")
    out = cf.generate(model, PROMPTS[:1], max_new_tokens=3)
    assert out.responses == [theirs[0][:3]]
    assert out.stats.notes == ()


# Where a model first meets the engine.


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that are compared, noted while everything runs as ever."""
    found: list[str] = []
    own = contract._compare

    def compare(models: Any, *others: Any) -> Any:
        found.append("+".join(m.name for m in models))
        return own(models, *others)

    monkeypatch.setattr(contract, "_compare", compare)
    return found


def test_a_model_is_compared_once_until_it_changes(compared: list[str]) -> None:
    model = make("llama")
    for _ in range(3):
        cf.generate(cf.Model(model, name="m"), PROMPTS, max_new_tokens=2)
    assert compared == ["m"]
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # a change of weights, as in training, calls for no comparison
    cf.generate(cf.Model(model, name="m"), PROMPTS, max_new_tokens=2)
    assert compared == ["m"]
    changes: list[Callable[[], Any]] = [
        lambda: model.train(),
        lambda: model.to(torch.bfloat16),
        lambda: setattr(model.config, "rms_norm_eps", 0.1),
        lambda: model.set_attn_implementation("eager"),
        lambda: setattr(model.model, "norm", nn.LayerNorm(16, dtype=torch.bfloat16)),
    ]
    for n, change in enumerate(changes, 2):
        change()
        for _ in range(2):
            cf.generate(cf.Model(model, name="m"), PROMPTS, max_new_tokens=2)
        assert compared == ["m"] * n


def test_a_call_looks_at_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[nn.Module] = []
    own = structure._of_module

    def of_module(module: nn.Module) -> Any:
        looks.append(module)
        return own(module)

    monkeypatch.setattr(structure, "_of_module", of_module)
    model = lora(1, lora(2, make("llama"), "one"), "two")
    terms = [cf.Model(model, adapter=a, name=a or "base") for a in (None, "one", "two")]
    blends = (
        terms[0] + 0.5 * (terms[1] - terms[2]),  # the terms share a head
        cf.presets.contrastive(make("llama"), make("llama", 1)),  # few columns of a guide's head
    )
    for blend in blends:
        cf.generate(blend, PROMPTS, max_new_tokens=2)  # compares each model with its own path
        looks.clear()
        cf.generate(blend, PROMPTS, max_new_tokens=2)
        assert len(looks) == len(set(looks))


def test_what_is_found_of_a_model_does_not_keep_it() -> None:
    import gc
    import weakref

    model = make("llama")
    cf.generate(model, PROMPTS, max_new_tokens=2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_adapters_are_compared_together_and_anew(compared: list[str]) -> None:
    model = lora(1, lora(0, make("llama"), "first"), "second").eval()
    terms = [cf.Model(model, adapter=name, name=name) for name in ("first", "second")]
    out = cf.generate(terms[0] + 0.5 * terms[1], PROMPTS, max_new_tokens=4)
    assert compared == ["first+second"]
    assert out.stats.notes == ()
    cf.generate(terms[1], PROMPTS, max_new_tokens=2)
    assert compared == ["first+second", "second"]


def test_every_adapter_is_compared() -> None:
    """One adapter alone changes a layer, and the engine would run just that layer wrongly."""
    model = lora(
        1, lora(0, make("llama"), "first", modules=["q_proj"]), "second", modules=["up_proj"]
    )
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_A["second"].forward = lambda x: -x[..., :2]
    terms = [cf.Model(model.eval(), adapter=name, name=name) for name in ("first", "second")]
    blend = terms[0] + terms[1]
    theirs = cf.generate(blend, PROMPTS, max_new_tokens=NEW, engine=cf.Engine(simple=True))
    out = cf.generate(blend, PROMPTS, max_new_tokens=NEW)
    assert out.responses == theirs.responses
    assert out.stats.notes != ()


@pytest.mark.parametrize("kind", [Twice, Counting])
def test_value_heads_over_other_bodies(kind: type[Strange]) -> None:
    from crossfade.training import value_model

    base = make("llama", 3)
    q = value_model(strange(kind), rank=2)
    nn.init.normal_(q.get_output_embeddings().b)
    blend = cf.Model(base) + cf.ValueHead(q, name="q")
    theirs = cf.generate(blend, PROMPTS, max_new_tokens=NEW, engine=cf.Engine(simple=True))
    out = cf.generate(blend, PROMPTS, max_new_tokens=NEW)
    assert out.responses == theirs.responses
    assert STRANGE[kind] in out.stats.notes[0]


@pytest.mark.parametrize("kind", [Twice, Counting, None])
def test_reward_models_with_other_bodies(kind: type[Strange] | None, tokenizer: Any) -> None:
    torch.manual_seed(2)
    config = make("llama").config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.4)
    if kind is not None:
        strange(kind, model)
    search = cf.BestOfN(4, cf.RewardModel(model, tokenizer))
    options: dict[str, Any] = {"max_new_tokens": 6, "seed": 1, "search": search}
    options["tokenizer"] = tokenizer
    base = make("llama", 4)
    theirs = cf.generate(base, ["the film was", "a"], engine=cf.Engine(simple=True), **options)
    out = cf.generate(base, ["the film was", "a"], **options)
    torch.testing.assert_close(out.values, theirs.values)
    assert bool(out.stats.notes) == (kind is not None)
    assert kind is None or STRANGE[kind] in out.stats.notes[0]


def test_a_value_of_zeros_is_compared_again(compared: list[str]) -> None:
    """A new head, which is all zeros, shows nothing of the body under it."""
    from crossfade.training import value_model

    q = value_model(strange(Shifted), rank=2)
    blend = cf.Model(make("llama", 3), name="m") + cf.ValueHead(q, name="q")
    assert cf.generate(blend, PROMPTS, max_new_tokens=2).stats.notes == ()
    nn.init.normal_(q.get_output_embeddings().b)
    out = cf.generate(blend, PROMPTS, max_new_tokens=2)
    assert compared == ["m", "q", "q"]
    assert "not its own" in out.stats.notes[0]


def test_the_callers_draws_stay_where_they_were() -> None:
    model = make("llama")
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    contract._compare([cf.decoding.simple.term_model.TermModel(model, "m")], None, True)
    assert torch.equal(torch.rand(3), expected)
