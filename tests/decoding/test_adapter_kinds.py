"""Adapters of every kind in PEFT, as terms: they give what PEFT gives, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import crossfade as cf
import peft
import pytest
import torch
from peft.tuners.lora.config import KasaConfig
from tiny_models import make
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPTS = [[5, 9, 13, 7, 11], [8, 21]]
ENGINES = {"engine": cf.Engine(), "simple": cf.Engine(simple=True)}
TWO = {"target_modules": ["q_proj", "down_proj"]}


def of_lora(**options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 2, **TWO, **options})


KINDS: dict[str, Callable[[], Any]] = {
    "lora": of_lora(),
    "rslora": of_lora(use_rslora=True, lora_alpha=3),
    "patterns": of_lora(rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 5}),
    "one layer": of_lora(layers_to_transform=[1]),
    "dora": of_lora(use_dora=True),
    "qalora": of_lora(use_qalora=True, qalora_group_size=2),
    "lora bias": of_lora(lora_bias=True),
    "embedding": of_lora(target_modules=["embed_tokens", "q_proj"]),
    "head": of_lora(target_modules=["lm_head", "q_proj"]),
    "saved head": of_lora(modules_to_save=["lm_head"]),
    "saved norm": of_lora(modules_to_save=["norm"]),
    "tokens beside": of_lora(trainable_token_indices=[7, 13]),
    "parameters": of_lora(target_modules=[], target_parameters=["mlp.gate_proj.weight"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 7, 13]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "adalora": lambda: peft.AdaLoraConfig(total_step=9, init_r=2, target_r=2, **TWO),
    "loha": lambda: peft.LoHaConfig(r=2, **TWO),
    "lokr": lambda: peft.LoKrConfig(r=2, **TWO),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **TWO),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **TWO),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=9, **TWO),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, topk=1, **TWO),
    "hra": lambda: peft.HRAConfig(r=2, **TWO),
    "miss": lambda: peft.MissConfig(r=2, **TWO),
    "randlora": lambda: peft.RandLoraConfig(r=2, target_modules=["q_proj"]),
    "shira": lambda: peft.ShiraConfig(r=2, **TWO),
    "c3a": lambda: peft.C3AConfig(block_size=8, **TWO),
    "road": lambda: peft.RoadConfig(group_size=4, **TWO),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=9, **TWO),
    "osf": lambda: peft.OSFConfig(effective_rank=4, **TWO),
    "delora": lambda: peft.DeloraConfig(r=2, **TWO),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, **TWO),
}
CHANGED_BASE = {  # adapters that change the base's weights, and what of their settings does so
    "bias": (of_lora(bias="all"), "bias='all'"),
    "pissa": (of_lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "olora": (of_lora(init_lora_weights="olora"), "init_lora_weights='olora'"),
    "kasa": (of_lora(kasa_config=KasaConfig()), "is a KaSA"),
    "replication": (of_lora(layer_replication=[(0, 2), (0, 2)]), "layer_replication"),
}


def fill(model: Any, adapter: str, seed: int) -> None:
    """Fill an adapter with weights that change something; most change nothing at first."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if adapter in name.split(".") and p.is_floating_point():
            torch.nn.init.normal_(p, std=0.3) if p.dim() else p.data.fill_(0.3)


def adapted(config: Callable[[], Any], *, second: bool = True, **options: Any) -> Any:
    """A model with the adapters `a`, which is active, and `b`."""
    model: Any = peft.get_peft_model(make(), config(), adapter_name="a", **options)
    fill(model, "a", 1)
    if second:
        model.add_adapter("b", config())
        fill(model, "b", 2)
        model.set_adapter("a")
    return model.eval()


def own(model: Any, ids: list[int], new: int) -> Tensor:
    """``[new, V]`` float64: log-probs of the last tokens of `ids` by the model as it is."""
    with torch.no_grad():
        z = model(input_ids=torch.tensor([ids])).logits[0].double()
    return z[len(ids) - new - 1 : -1].log_softmax(-1)


def as_peft_gives(model: Any, adapter: str | None, ids: list[int], new: int) -> Tensor:
    """The same, after PEFT's own switches have made `adapter` the active one."""
    if adapter == "active":
        return own(model, ids, new)
    if adapter is None:
        with model.disable_adapter():
            return own(model, ids, new)
    active = model.active_adapter
    model.set_adapter(adapter)
    try:
        return own(model, ids, new)
    finally:
        model.set_adapter(active)


def check(model: Any, adapters: list[str | None], engine: cf.Engine, truth: Any) -> Any:
    """Each adapter, as a term beside the others, has the log-probs of `truth` at each token."""
    terms = [cf.Model(model, adapter=a) for a in adapters]
    out = cf.generate(
        sum((0.7 - 0.4 * k) * t for k, t in enumerate(terms)),
        PROMPTS,
        engine=engine,
        max_new_tokens=3,
        return_term_logprobs=True,
    )
    order = [t.adapter for t in terms]
    for row, response in enumerate(out.responses):
        at = torch.arange(len(response)), torch.tensor(response)
        for k, adapter in enumerate(order):
            expected = truth(model, adapter, PROMPTS[row] + response, len(response))[at]
            given = out.term_logprobs[row, : len(response), k].double()
            torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-5)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_is_what_peft_gives(kind: str) -> None:
    alone = kind == "adalora"  # AdaLoRA allows no second adapter.
    model = adapted(KINDS[kind], second=not alone)
    adapters: list[str | None] = ["active", None, "a", *([] if alone else ["b"])]
    for engine in ENGINES.values():
        check(model, adapters, engine, as_peft_gives)
    ids = PROMPTS[0] + [7]
    first, plain = (as_peft_gives(model, x, ids, 1) for x in ("a", None))
    assert (first - plain).abs().max() > 0.01, "this adapter does nothing: it tests nothing"


@pytest.mark.parametrize("kind", CHANGED_BASE)
def test_a_base_that_an_adapter_changed_is_not_plain(kind: str) -> None:
    config, why = CHANGED_BASE[kind]
    model = adapted(config, second=False)
    for engine in ENGINES.values():
        check(model, ["active", "a"], engine, as_peft_gives)
    with pytest.raises(ValueError, match=f"adapter is None, but adapter 'a' .*{why}"):
        cf.Model(model, adapter=None)


CAUSAL = {"task_type": "CAUSAL_LM"}
REFUSED = {
    "LILY": lambda: peft.LilyConfig(r=2, **TWO),
    "SHADOW": lambda: peft.ShadowConfig(),
    "POLY": lambda: peft.PolyConfig(r=2, n_tasks=1, n_skills=2, n_splits=1, **CAUSAL, **TWO),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **CAUSAL),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_do_more_than_change_layers_are_refused(kind: str) -> None:
    model = peft.get_peft_model(make(), REFUSED[kind](), adapter_name="a")
    for adapter in ("active", "a", None):
        with pytest.raises(NotImplementedError, match=f"adapter 'a' of PEFT's type {kind}"):
            cf.Model(model, adapter=adapter)
    with pytest.raises(NotImplementedError, match=kind):
        cf.ValueHead(model)


def test_x_lora_is_refused(tmp_path: Path) -> None:
    adapted(KINDS["lora"]).save_pretrained(str(tmp_path))
    base = make()
    base.config.use_cache = False  # X-LoRA asks for this
    config = peft.XLoraConfig(
        hidden_size=16, adapters={"0": str(tmp_path / "a"), "1": str(tmp_path / "b")}, **CAUSAL
    )
    with pytest.raises(NotImplementedError, match="XLORA"):
        cf.Model(peft.get_peft_model(base, config))


def test_arrow(tmp_path: Path) -> None:
    """Arrow is a router over saved adapters, which looks at each token alone."""
    adapted(KINDS["lora"]).save_pretrained(str(tmp_path))
    model = peft.create_arrow_model(
        make(), [str(tmp_path / "a"), str(tmp_path / "b")], peft.ArrowConfig(top_k=1)
    ).eval()
    for engine in ENGINES.values():
        check(model, ["active", None, "arrow_router", "task_1"], engine, as_peft_gives)


def test_an_activated_lora_is_refused_where_it_is_used() -> None:
    """aLoRA begins at some token of the prompt; other adapters of its model work as ever."""
    model = adapted(of_lora(alora_invocation_tokens=[7], **CAUSAL), second=False)
    model.add_adapter("b", of_lora(**CAUSAL)())
    fill(model, "b", 2)
    term = cf.Model(model)
    with pytest.raises(NotImplementedError, match="adapter is 'a', an activated LoRA"):
        cf.Model(model, adapter="a")
    for engine in ENGINES.values():
        with pytest.raises(NotImplementedError, match="adapter of model0 is 'a', an activated"):
            cf.generate(term, PROMPTS, engine=engine, max_new_tokens=1)
        check(model, [None, "b"], engine, as_peft_gives)
    with pytest.raises(NotImplementedError, match="activated LoRA"):
        cf.score(term, PROMPTS, [[7], [8]])
    with model.disable_adapter():
        check(model, ["active"], cf.Engine(), as_peft_gives)
    model.set_adapter("b")
    check(model, ["active"], cf.Engine(), as_peft_gives)


def test_adapters_of_transformers_own() -> None:
    """`model.add_adapter` puts PEFT's layers into a model that is no PeftModel."""
    model = make()
    for name, seed in (("a", 1), ("b", 2)):
        model.add_adapter(KINDS["lora"](), name)
        fill(model, name, seed)
    model.set_adapter("a")

    def truth(model: Any, adapter: str | None, ids: list[int], new: int) -> Tensor:
        if adapter == "active":
            return own(model, ids, new)
        if adapter is None:
            model.disable_adapters()
        else:
            model.set_adapter(adapter)
        found = own(model, ids, new)
        model.enable_adapters()
        model.set_adapter("a")
        return found

    for engine in ENGINES.values():
        check(model, ["active", None, "a", "b"], engine, truth)
    model.set_adapter(["a", "b"])
    check(model, ["active"], cf.Engine(), truth)
    with pytest.raises(ValueError, match=r"'c', which the LlamaForCausalLM does not have"):
        cf.Model(model, adapter="c")


def test_layers_injected_into_a_model() -> None:
    """`inject_adapter_in_model` puts PEFT's layers into a model, as PeftModel does inside it."""
    model = make()
    peft.inject_adapter_in_model(KINDS["lora"](), model, "a")
    fill(model, "a", 1)
    wrapped = adapted(KINDS["lora"])
    for inner in (model.eval(), wrapped.get_base_model()):

        def truth(model: Any, adapter: str | None, ids: list[int], new: int) -> Tensor:
            return own(make() if adapter is None else model, ids, new)

        for engine in ENGINES.values():
            check(inner, ["active", None, "a"], engine, truth)


def test_a_mixed_model() -> None:
    model: Any = peft.get_peft_model(make(), KINDS["lora"](), adapter_name="a", mixed=True)
    model.add_adapter("b", KINDS["loha"]())
    fill(model, "a", 1)
    fill(model.eval(), "b", 2)
    active: Any = "a"

    def truth(model: Any, adapter: str | None, ids: list[int], new: int) -> Tensor:
        if adapter is None:
            with model.disable_adapter():
                return own(model, ids, new)
        model.set_adapter(active if adapter == "active" else adapter)
        found = own(model, ids, new)
        model.set_adapter(active)
        return found

    for active in ("a", ["a", "b"]):
        model.set_adapter(active)
        for engine in ENGINES.values():
            check(model, ["active", None, "a", "b"], engine, truth)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_adapters_that_come_and_go(engine: cf.Engine) -> None:
    """Each call looks at a term's adapter anew."""
    model = adapted(KINDS["lora"])
    term = cf.Model(model, adapter="b", name="guide")

    def run() -> Any:
        return cf.generate(term, PROMPTS, engine=engine, max_new_tokens=2)

    check(model, ["b"], engine, as_peft_gives)
    fill(model, "b", 7)  # changes its weights in place
    check(model, ["b"], engine, as_peft_gives)
    model.delete_adapter("b")
    with pytest.raises(ValueError, match=r"adapter of guide is 'b', which .* one of \['a'\]"):
        run()
    with pytest.raises(ValueError, match="adapter of guide is 'b'"):
        cf.score(term, PROMPTS, [[7], [8]])
    model.add_adapter("b", KINDS["lora"]())
    fill(model, "b", 9)
    check(model, ["b"], engine, as_peft_gives)
    model.peft_config["new"] = model.peft_config.pop("b")
    with pytest.raises(ValueError, match=r"adapter is 'new', .* in none of its layers"):
        cf.Model(model, adapter="new")


def test_a_hotswapped_adapter(tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    other = adapted(KINDS["lora"])
    fill(other, "a", 21)
    other.save_pretrained(str(tmp_path))
    model = adapted(KINDS["lora"])
    term = cf.Model(model, adapter="b")
    before = cf.generate(term, PROMPTS, max_new_tokens=3)
    hotswap_adapter(model, str(tmp_path / "a"), adapter_name="b", torch_device="cpu")
    assert not torch.equal(cf.generate(term, PROMPTS, max_new_tokens=3).logprobs, before.logprobs)
    check(model, ["b"], cf.Engine(), as_peft_gives)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_merged_adapters(engine: cf.Engine) -> None:
    model = adapted(KINDS["lora"])
    model.merge_adapter(["a"])
    check(model, ["active"], engine, as_peft_gives)
    with pytest.raises(ValueError, match="merged into its weights"):
        cf.generate(cf.Model(model, adapter=None), PROMPTS, engine=engine, max_new_tokens=1)
    for layer in (
        model.modules()
    ):  # as inside disable_adapter, where PEFT would unmerge at its first forward
        if hasattr(layer, "_disable_adapters"):
            layer._disable_adapters = True
    out = cf.generate(model, PROMPTS, engine=engine, max_new_tokens=3)
    plain = cf.generate(make(), PROMPTS, engine=engine, max_new_tokens=3)
    torch.testing.assert_close(out.logprobs, plain.logprobs, atol=1e-4, rtol=1e-4)


def test_unloaded_adapters() -> None:
    """The wrapper still lists adapters whose layers are gone; the plain base is gone with them."""
    model = adapted(KINDS["lora"])
    alone = model.merge_and_unload()
    out = cf.generate(cf.Model(model), PROMPTS, max_new_tokens=3)
    assert torch.equal(out.sequences, cf.generate(alone, PROMPTS, max_new_tokens=3).sequences)
    with pytest.raises(ValueError, match="adapter is None, but the model has no layer"):
        cf.Model(model, adapter=None)
    with pytest.raises(ValueError, match="'a', which is in the model's peft_config"):
        cf.Model(model, adapter="a")
