"""Conditioned policies: a reference and a delta a reward, at any weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.policies import conditioned
from peft import PeftModel
from tiny_models import lora, make, make_tokenizer
from transformers import LlamaForCausalLM, PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PROMPTS = [[5, 6, 7, 8], [9, 10], [11]]
W, KL = [0.7, 0.0, 1.0], [0.0, 0.5, 1.0]
SIMPLE = cf.Engine(simple=True)
ATTENTION, HEAD, ELSEWHERE = ["q_proj", "v_proj"], ["lm_head"], ["up_proj"]


def save(folder: Path, seed: int, name: str, modules: list[str], **options: Any) -> Path:
    """A folder with an adapter, as PEFT saves it."""
    model = lora(seed, make(), name, 2 + seed, modules, **options)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder / name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "helpful": save(root, 1, "helpful", ATTENTION),
        "brief": save(root, 2, "brief", ATTENTION[:1], use_rslora=True),
        "part": save(root, 3, "part", ELSEWHERE),
        "helpful_head": save(root, 4, "helpful_head", HEAD),
        "brief_head": save(root, 5, "brief_head", HEAD),
    }


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return make()


@pytest.fixture(scope="module")
def policy(base: PreTrainedModel, folders: dict[str, Path]) -> cf.ConditionedPolicy:
    two = {name: folders[name] for name in ("helpful", "brief")}
    return cf.ConditionedPolicy.from_adapters(base, two, scope="attention")


def of_heads(folders: dict[str, Path], base: Any = None, **options: Any) -> Any:
    two = {"helpful": folders["helpful_head"], "brief": folders["brief_head"]}
    base = make() if base is None else base
    return cf.ConditionedPolicy.from_adapters(base, two, scope="head", **options)


def written(term: Any, prompts: Any = PROMPTS, **options: Any) -> Any:
    return cf.generate(term, prompts, max_new_tokens=6, eos_token_id=-1, **options)


def check_rows(policy: cf.ConditionedPolicy) -> None:
    """Rows of one forward write what each writes by a plain model that is merged for it."""
    weights = {"helpful": torch.tensor(W), "brief": [1 - w for w in W]}
    out = written(policy.at(weights, kl=torch.tensor(KL)))
    assert out.stats.models[0].forwards == 1 + 6, out.stats.notes
    for i, (w, kl) in enumerate(zip(W, KL, strict=True)):
        plain = policy.merged({"helpful": w, "brief": 1 - w}, kl=kl)
        theirs = written(plain, PROMPTS[i : i + 1], engine=SIMPLE)
        assert out.responses[i] == theirs.responses[0]
        torch.testing.assert_close(out.logprobs[i], theirs.logprobs[0], atol=1e-5, rtol=0)


def test_at_is_explicit_averaging(policy: cf.ConditionedPolicy, base: PreTrainedModel) -> None:
    check_rows(policy)
    plain = policy.merged({"helpful": 0.7, "brief": 0.3}, kl=0.2)
    own = dict(base.named_parameters())
    layers = dict(policy.model.get_base_model().named_modules())
    for name, weight in plain.named_parameters():
        layer: Any = layers[name.removesuffix(".weight")]
        delta = torch.zeros_like(weight)
        for adapter, w in (("helpful", 0.56), ("brief", 0.24)):
            if adapter in getattr(layer, "lora_A", ()):
                low = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
                delta += w * layer.scaling[adapter] * low
        torch.testing.assert_close(weight, own[name] + delta)


def test_the_weight_of_the_divergence_may_be_among_the_others(policy: cf.ConditionedPolicy) -> None:
    """A sweep has them in one weighting, which sums to 1."""
    rows = {"helpful": [0.7, 0.0, 0.0], "brief": [0.3, 0.5, 0.0], "kl": torch.tensor([0, 0.5, 1])}
    out = written(policy.at(rows))
    assert out.responses == written(policy.at({"helpful": [0.7, 0, 0.5], "brief": [0.3, 1, 0.5]},
                                              kl=[0, 0.5, 1])).responses  # fmt: skip
    for i in range(3):
        own = {name: float(w[i]) for name, w in rows.items()}
        assert written(policy.at(own), PROMPTS[i : i + 1]).responses[0] == out.responses[i]
        plain = written(policy.merged(own), PROMPTS[i : i + 1], engine=SIMPLE)
        assert plain.responses[0] == out.responses[i]


def test_the_base_stays_as_it_is(policy: cf.ConditionedPolicy, base: PreTrainedModel) -> None:
    assert not any("lora" in name for name, _ in base.named_modules())
    assert written(base).responses == written(make()).responses
    assert written(policy.at({"brief": 1}, kl=1.0)).responses == written(base).responses
    assert written(policy.reference).responses == written(base).responses
    out = written(policy.at({"brief": 1}), kl_to=policy.reference)
    assert len(out.stats.models) == 1, "the reference is rows of the same forward"
    # `brief` adapts queries alone, which change nothing where one token, a whole prompt, is read.
    assert out.kl[2, 0] == pytest.approx(0.0, abs=1e-6)
    assert (out.kl.flatten()[[*range(12), *range(13, 18)]] > 0).all()
    shared = {p.data_ptr() for p in base.parameters()}
    assert shared <= {p.data_ptr() for p in policy.model.parameters()}, "no weight is copied"


def test_heads(folders: dict[str, Path]) -> None:
    check_rows(of_heads(folders))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_of_tied_weights_that_with_a_delta_is_untied(module: str, tmp_path: Path) -> None:
    """A delta of the head is not one of the embeddings, nor the other way round."""
    config = make().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    tied = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(tied.lm_head.weight, std=0.3)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    adapters = {
        name: save(tmp_path, seed, name, [module]) for seed, name in enumerate(("helpful", "brief"))
    }
    policy = cf.ConditionedPolicy.from_adapters(tied, adapters)
    weights = {"helpful": W, "brief": [1 - w for w in W]}
    out = written(policy.at(weights, kl=0.1))
    for i, w in enumerate(W):
        plain = policy.merged({"helpful": w, "brief": 1 - w}, kl=0.1)
        assert written(plain, PROMPTS[i : i + 1]).responses[0] == out.responses[i]
        kept, changed = plain.model.embed_tokens, plain.lm_head
        if module == "embed_tokens":
            kept, changed = changed, kept
        assert torch.equal(kept.weight, tied.lm_head.weight)
        assert not torch.equal(changed.weight, tied.lm_head.weight)
    plain.save_pretrained(tmp_path / "plain")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert written(again, PROMPTS[2:]).responses[0] == out.responses[2]
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["scaled", "trained"])
def test_a_shared_part(
    kind: str, base: PreTrainedModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    two = {name: folders[name] for name in ("helpful", "brief")}
    policy = cf.ConditionedPolicy.from_adapters(
        base, two, scope="attention", shared=folders["part"], shared_as=kind
    )
    check_rows(policy)
    end = written(policy.at({"helpful": 1.0}, kl=1.0)).responses
    assert (end == written(base).responses) is (kind == "scaled")
    policy.save(tmp_path)
    again = cf.ConditionedPolicy.load(tmp_path, base)
    assert repr(again) == (
        "ConditionedPolicy(LlamaForCausalLM, rewards=['helpful', 'brief'], scope='attention', "
        f"shared={kind!r})"
    )
    assert written(again.at({"helpful": 1.0}, kl=1.0)).responses == end


def test_a_saved_policy(policy: cf.ConditionedPolicy, base: Any, tmp_path: Path) -> None:
    policy.save(tmp_path)
    tokenizer = make_tokenizer()
    again = cf.ConditionedPolicy.load(tmp_path, base, tokenizer=tokenizer)
    weights = {"helpful": 0.5, "brief": 0.5}
    assert written(again.at(weights)).responses == written(policy.at(weights)).responses
    assert again.at(weights).tokenizer is tokenizer
    alone = PeftModel.from_pretrained(make(), tmp_path / "brief").eval()
    assert written(alone).responses == written(policy.at({"brief": 1.0})).responses
    policy.merged(weights).save_pretrained(tmp_path / "plain")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert written(plain).responses == written(policy.at(weights)).responses

    whole = json.loads((tmp_path / "policy.json").read_text())
    for key, value, says in (
        ("format", 2, "has format 2; this version of crossfade reads 1"),
        ("rewards", ["../helpful"], "adapters has '../helpful'; the name of a reward must be of"),
        ("rewards", "helpful", "has rewards 'helpful'; they must be a list"),
        ("shared", "fixed", "has shared 'fixed'"),
        ("scope", "heads", "scope is 'heads'; it must be one of 'full', 'attention', 'head'"),
        ("extra", 1, "has the key 'extra'"),
    ):
        (tmp_path / "policy.json").write_text(json.dumps(whole | {key: value}))
        with pytest.raises(ValueError, match=says):
            cf.ConditionedPolicy.load(tmp_path, base)
    with pytest.raises(FileNotFoundError, match=r"has no policy\.json"):
        cf.ConditionedPolicy.load(tmp_path / "brief", base)


@pytest.mark.parametrize(
    ("weights", "kl", "error", "says"),
    [
        ({"helpful": 0.7, "brief": 0.2}, 0, ValueError, "weights sum to 0.9; they must sum to 1"),
        (
            {"helpful": 1.5, "brief": -0.5},
            0,
            ValueError,
            r"weights\['brief'\] is -0.5; it must not",
        ),
        ({"helpfull": 1.0}, 0, ValueError, r"'helpfull', which is no reward.*mean 'helpful'\?"),
        ({}, 0, ValueError, "weights sum to 0; they must sum to 1"),
        ([0.5, 0.5], 0, TypeError, "weights is a list; it must be a dict"),
        ({"helpful": [1.0, 0.5]}, 0, ValueError, "weights sum to 0.5 for request 1"),
        ({"helpful": [1, 0], "brief": [1]}, 0, ValueError, "weights has .* must have one length"),
        ({"helpful": float("nan")}, 0, ValueError, r"weights\['helpful'\] is nan"),
        ({"helpful": torch.tensor([float("nan")])}, 0, ValueError, r"weights\['helpful'\]\[0\] is"),
        ({"helpful": 1.0}, 1.2, ValueError, r"kl is 1.2; it must be within \[0, 1\]"),
        ({"helpful": 1.0}, [0.0, -1.0], ValueError, r"kl\[1\] is -1; it must be within"),
        ({"helpful": 1.0}, "none", TypeError, "kl is a str"),
        ({"helpful": [1.0, 1.0]}, [0.0] * 3, ValueError, r"weights and kl are \[3\] and \[2\]"),
        ({"helpful": 1.0, "kl": 0.5}, 0, ValueError, "weights sum to 1.5; they must sum to 1"),
        ({"helpful": 0.5, "kl": 0.5}, 0.1, ValueError, "weights has 'kl', and kl is given too"),
    ],
)
def test_mistakes(
    policy: cf.ConditionedPolicy, weights: Any, kl: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        policy.at(weights, kl=kl)
    with pytest.raises((TypeError, ValueError)):
        policy.merged(weights, kl=kl)


def test_merged_takes_numbers(policy: cf.ConditionedPolicy) -> None:
    with pytest.raises(ValueError, match=r"weights\['helpful'\] has a number for each request"):
        policy.merged({"helpful": [1.0, 1.0]})
    with pytest.raises(ValueError, match="kl has a number for each request"):
        policy.merged({"helpful": 1.0}, kl=torch.zeros(2))


def test_mistakes_of_adapters(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    make_policy = cf.ConditionedPolicy.from_adapters
    one = {"helpful": folders["helpful"]}
    with pytest.raises(ValueError, match=r"changes model.layers.0.mlp.up_proj, and scope is 'att"):
        make_policy(base, {"part": folders["part"]}, scope="attention")
    with pytest.raises(ValueError, match=r"self_attn.q_proj, and scope is 'head'"):
        make_policy(base, one, scope="head")
    with pytest.raises(ValueError, match=r"scope is 'heads'; it must be .* did you mean 'head'"):
        make_policy(base, one, scope="heads")
    with pytest.raises(ValueError, match="shared_as is 'fixed'"):
        make_policy(base, one, shared_as="fixed")
    with pytest.raises(ValueError, match="adapters has 'shared'; the name of a reward"):
        make_policy(base, {"shared": folders["part"]})
    with pytest.raises(ValueError, match="adapters has 'kl'; the name of a reward must be of"):
        make_policy(base, {"kl": folders["part"]})
    with pytest.raises(ValueError, match="adapters is empty"):
        make_policy(base, {})
    with pytest.raises(TypeError, match="adapters is a list"):
        make_policy(base, [folders["part"]])
    with pytest.raises(
        FileNotFoundError, match=r"adapters\['helpful'\] is '.*nowhere'; it must be"
    ):
        make_policy(base, {"helpful": tmp_path / "nowhere"})
    with pytest.raises(TypeError, match="base is a PeftModelForCausalLM with PEFT adapters"):
        make_policy(lora(1, make(), "kind"), one)
    with pytest.raises(ValueError, match=r"folders\['part'\] is .* an adapter of a model like"):
        make_policy(make("gpt2"), {"part": folders["part"]})
    for name, of in (("helpful", "hub/one"), ("brief", "hub/two")):
        copied = tmp_path / name
        copied.mkdir()
        for file in folders[name].iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        config = json.loads((copied / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = of
        (copied / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="different bases: 'helpful' of 'hub/one' and 'brief' of"):
        make_policy(base, {name: tmp_path / name for name in ("helpful", "brief")})
    named = make()
    named.config._name_or_path = "hub/three"
    with pytest.warns(UserWarning, match="base was loaded from 'hub/three', and the adapters say"):
        make_policy(named, {"brief": tmp_path / "brief"})
    named.config._name_or_path = "folder/TWO"
    policy = make_policy(named, {"brief": tmp_path / "brief"})
    with pytest.raises(
        TypeError, match=r"Hugging Face model; its term at some weights is x\.at\(w"
    ):
        cf.generate(policy, PROMPTS)


def test_embeddings_beside_an_adapter(tmp_path: Path) -> None:
    """PEFT saves the base's head and embeddings beside an adapter of them, and loads them too."""
    model = lora(1, make(), "helpful", 2, HEAD)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    one, base = {"helpful": tmp_path / "helpful"}, make()
    assert written(cf.ConditionedPolicy.from_adapters(base, one).at({"helpful": 1})).responses
    with torch.no_grad():
        base.lm_head.weight[3] += 1
    kept = base.lm_head.weight.clone()
    with pytest.raises(ValueError, match=r"lm_head.base_layer.weight, which base has otherwise"):
        cf.ConditionedPolicy.from_adapters(base, one)
    assert torch.equal(base.lm_head.weight, kept)


def test_models_blended_token_by_token(policy: cf.ConditionedPolicy, base: Any) -> None:
    helpful, brief = policy.at({"helpful": 1}), policy.at({"brief": 1})
    mod = conditioned.DecodedPolicy(policy.reference, {"helpful": helpful, "brief": brief})
    mine = written(mod.at({"helpful": [0.7] * 3, "brief": 0.3}, kl=0.5))
    theirs = written(0.5 * policy.reference + 0.35 * helpful + 0.15 * brief)
    assert mine.responses == theirs.responses
    assert len(mod.at({"helpful": 1}).terms) == 1
    dera = conditioned.DecodedPolicy(base, {"helpful": helpful}).at({"helpful": 1}, kl=0.25)
    assert written(dera).responses == written(cf.presets.dera(base, helpful, 0.75)).responses
    assert len(dera.models) == 2
    with pytest.raises(ValueError, match=r"kl is 0.5, and ref is None"):
        conditioned.DecodedPolicy(None, {"helpful": helpful}).at({"helpful": 1}, kl=0.5)
    same = mod.at({"helpful": 0.25, "brief": 0.25, "kl": 0.5})
    assert same.weights == mod.at({"helpful": 0.5, "brief": 0.5}, kl=0.5).weights
    with pytest.raises(ValueError, match="models has 'kl', the name of the KL weight"):
        conditioned.DecodedPolicy(None, {"kl": helpful})
    with pytest.raises(TypeError, match=r"models is .*; it must be a dict"):
        conditioned.DecodedPolicy(None, [helpful])


def test_a_soup_of_whole_models(policy: cf.ConditionedPolicy, base: PreTrainedModel) -> None:
    ends = {name: policy.merged({name: 1.0}) for name in policy.rewards}
    soup = conditioned.SoupPolicy(base, ends, make_tokenizer())
    weights = {"helpful": 0.7, "brief": 0.3}
    term = soup.at(weights, kl=0.2)
    theirs = policy.merged(weights, kl=0.2)
    for key, weight in term.model.named_parameters():
        torch.testing.assert_close(weight, theirs.get_parameter(key))
    assert written(term).responses == written(policy.at(weights, kl=0.2)).responses
    assert term.tokenizer is soup.tokenizer
    with pytest.raises(ValueError, match="kl has a number for each request"):
        soup.at(weights, kl=[0.0, 1.0])
    with pytest.raises(ValueError, match=r"models\['helpful'\] has nothing for model\.embed_tok"):
        conditioned.SoupPolicy(base, {"helpful": make("gpt2")})
    with pytest.raises(TypeError, match=r"models\['helpful'\] is a PeftModelForCausalLM with"):
        conditioned.SoupPolicy(base, {"helpful": policy.model})


def test_weights_in_a_prompt(base: Any) -> None:
    tokenizer = make_tokenizer()
    prompted = conditioned.PromptedPolicy(base, ["great", "dull"], tokenizer)
    term = prompted.at({"great": 0.7, "dull": 0.3}, kl=0.1)
    assert term.system == "[great: 0.70] [dull: 0.30] [KL: 0.10]"
    assert cf.generate(term, ["the film"], max_new_tokens=2).text
    mine = conditioned.PromptedPolicy(cf.Model(base), ["a"], tokenizer, prompt=lambda w, kl: f"{w}")
    assert mine.at({"a": 1}).system == "{'a': 1.0}"
    assert mine.at({"kl": 1}).system == "{'a': 1.0}"  # nothing is left for what it counts
    with pytest.raises(ValueError, match="rewards has 'kl'"):
        conditioned.PromptedPolicy(base, ["kl"], tokenizer)
    rows = {"great": [1.0, 0.7], "dull": [0.0, 0.3]}
    mixed = cf.generate(prompted.at(rows, kl=0.1), ["the film", "the plot"], max_new_tokens=4)
    for i, (great, dull) in enumerate([(1.0, 0.0), (0.7, 0.3)]):
        own = prompted.at({"great": great, "dull": dull}, kl=0.1)
        text = cf.generate(own, [("the film", "the plot")[i]], max_new_tokens=4).text
        assert text == mixed.text[i : i + 1]
    with pytest.raises(ValueError, match=r"weights and kl are \[2\] and \[3\]"):
        prompted.at(rows, kl=[0.0] * 3)
    with pytest.raises(TypeError, match="rewards is 'great'; it must be a list"):
        conditioned.PromptedPolicy(base, "great", tokenizer)
