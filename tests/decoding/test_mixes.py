"""Mixes of adapters in weight space: each row has the weights that its own request gives."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.blends.mixes import Mix
from crossfade.bulk.decode import decode
from crossfade.decoding.scoring import Scorer
from peft import PeftModel
from tiny_models import lora, make
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Batch = dict[str, torch.Tensor]
SIMPLE = cf.Engine(simple=True)
ENGINES = [None, SIMPLE]
A = [0.7, 0.0, 1.5, -0.4]
B = [0.3, 1.0, -0.5, 0.2]


@pytest.fixture(scope="module")
def two() -> PeftModel:
    """One model with adapters of different ranks, scalings and layers."""
    model = lora(2, lora(1, make(), "kind"), "brief", 3, ["q_proj", "up_proj"], use_rslora=True)
    model.set_adapter("kind")
    return model.eval()


def merged(model: PeftModel, weights: dict[str, float]) -> Any:
    """The model whose weights are explicitly ``W + sum_k w_k s_k B_k A_k``."""
    alone = copy.deepcopy(model)
    for layer in (m for m in alone.modules() if hasattr(m, "lora_A")):
        for name, w in weights.items():
            if name in layer.lora_A:
                low = layer.lora_B[name].weight @ layer.lora_A[name].weight
                layer.base_layer.weight.data += w * layer.scaling[name] * low.detach()
    return alone.unload().eval()


def request(batch: Batch, i: int) -> Batch:
    """One request of a batch, without padding."""
    ids = batch["input_ids"][i][batch["attention_mask"][i].bool()][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def mix(*rows: int) -> dict[str, Any]:
    at = list(rows) or [0, 1, 2, 3]
    return {"kind": torch.tensor([A[i] for i in at]), "brief": [B[i] for i in at]}


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_have_their_own_merged_model(
    two: PeftModel, batch: Batch, engine: cf.Engine | None
) -> None:
    before = {k: v.clone() for k, v in two.state_dict().items()}
    out = cf.generate(
        cf.Model(two, adapter=mix()),
        batch,
        max_new_tokens=8,
        engine=engine,
        return_term_logprobs=True,
    )
    for i in range(4):
        alone = cf.Model(merged(two, {"kind": A[i], "brief": B[i]}))
        theirs = cf.generate(alone, request(batch, i), max_new_tokens=8, engine=SIMPLE)
        assert out.responses[i] == theirs.responses[0]
        n = len(theirs.responses[0])
        torch.testing.assert_close(out.logprobs[i, :n], theirs.logprobs[0], atol=1e-5, rtol=0)
    now = two.state_dict()
    assert all(torch.equal(now[k], v) for k, v in before.items()), "the model is as it was"


def test_rows_share_each_forward(two: PeftModel, batch: Batch) -> None:
    each = cf.generate(cf.Model(two, adapter=mix()), batch, max_new_tokens=6, eos_token_id=-1)
    one = cf.generate(
        cf.Model(two, adapter={"kind": 0.7, "brief": 0.3}), batch, max_new_tokens=6, eos_token_id=-1
    )
    assert not each.stats.notes
    # the prompts together, then one forward a step
    assert each.stats.models[0].forwards == one.stats.models[0].forwards == 1 + 6


def alone(two: PeftModel, i: int, inputs: Any, **options: Any) -> Any:
    """The output of one request by the merged model of its mix."""
    return cf.generate(cf.Model(merged(two, {"kind": A[i], "brief": B[i]})), inputs, **options)


@pytest.mark.parametrize("copies", [1, 3])
def test_a_mix_follows_its_row_through_a_queue(two: PeftModel, copies: int) -> None:
    """Places go from row to row, and what they hold of a prompt is of the former row's mix."""
    same = [[5, 6, 7, 8, 9, 10]] * 4
    sample = {"do_sample": True, "num_return_sequences": copies, "seed": [1, 2, 3, 4]}
    limits = [2, 7, 3, 5]
    out = cf.generate(
        cf.Model(two, adapter=mix()), same, max_new_tokens=limits, max_batch=2, **sample
    )
    for i in range(4):
        sample["seed"] = [i + 1]
        theirs = alone(two, i, same[:1], max_new_tokens=limits[i], **sample)
        assert out.responses[i * copies : (i + 1) * copies] == theirs.responses


def test_a_mix_of_each_prompt_in_bulk(two: PeftModel) -> None:
    prompts = [[5, 6, 7, 8], [5, 6, 7, 9, 10], [11], [5, 6, 7, 8]]
    term = cf.Model(two, adapter=mix())
    found = dict(decode(term, prompts, max_batch=2, max_new_tokens=4))
    for i, prompt in enumerate(prompts):
        theirs = alone(two, i, [prompt], max_new_tokens=4)
        assert found[i].responses == theirs.responses


def test_searches_branch_with_their_mix(two: PeftModel, batch: Batch) -> None:
    ref = cf.Model(two, adapter=None)
    ours = {}
    for engine in ENGINES:
        term = cf.Model(two, adapter=mix())
        out = cf.generate(
            term,
            batch,
            max_new_tokens=6,
            seed=[1, 2, 3, 4],
            engine=engine,
            search=cf.ChunkBeamSearch(2, 2, 2, value=cf.LogRatio(term, ref)),
        )
        ours[engine] = out
        fixed = cf.Model(two, adapter={"kind": A[1], "brief": B[1]})
        one = cf.generate(
            fixed,
            request(batch, 1),
            max_new_tokens=6,
            seed=[2],
            search=cf.ChunkBeamSearch(2, 2, 2, value=cf.LogRatio(fixed, ref)),
        )
        assert out.responses[1] == one.responses[0]
        torch.testing.assert_close(out.values[1:2], one.values, atol=1e-4, rtol=0)
    assert ours[None].responses == ours[SIMPLE].responses


def test_values_of_other_mixes(two: PeftModel, batch: Batch) -> None:
    half = cf.Model(two, adapter={"kind": 0.5, "brief": 0.5})
    base = cf.Model(two, adapter=None)
    found = [
        cf.generate(
            base, batch, max_new_tokens=4, seed=1, search=cf.BestOfN(3, cf.LogRatio(tuned, base))
        )
        for tuned in (half, cf.Model(merged(two, {"kind": 0.5, "brief": 0.5})))
    ]
    assert found[0].responses == found[1].responses
    torch.testing.assert_close(found[0].values, found[1].values, atol=1e-4, rtol=0)
    value = cf.LogRatio(cf.Model(two, adapter=mix()), base)
    with pytest.raises(NotImplementedError, match=r"a mix with weights \[4\]; in a value"):
        cf.generate(base, batch, max_new_tokens=4, search=cf.BestOfN(3, value))


def test_scores_and_divergences(two: PeftModel, batch: Batch) -> None:
    term, base = cf.Model(two, adapter=mix()), cf.Model(two, adapter=None)
    out = cf.generate(term, batch, max_new_tokens=5, kl_to=base)
    back = cf.generate(base, batch, max_new_tokens=5, kl_to=term)
    again = cf.score(term, batch, out.responses, kl_to=base)
    torch.testing.assert_close(again.logprobs, out.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.kl, out.kl, atol=1e-5, rtol=0)
    assert again.stats.models[0].forwards == 1
    for i in range(4):
        theirs = cf.Model(merged(two, {"kind": A[i], "brief": B[i]}))
        mine = {"input_ids": request(batch, i)["input_ids"]}
        one = cf.generate(cf.Model(merged(two, {})), mine, max_new_tokens=5, kl_to=theirs)
        n = one.kl.shape[1]
        torch.testing.assert_close(back.kl[i, :n], one.kl[0], atol=1e-4, rtol=0)
    same = [[5, 6, 7, 8, 9, 10]] * 4  # worth sharing, where mixes would allow it
    with Scorer(term) as scorer:
        for _ in range(2):
            found = scorer.score(same, [[11, 12]] * 4)
            for i in range(4):
                theirs = cf.Model(merged(two, {"kind": A[i], "brief": B[i]}))
                one = cf.score(theirs, same[:1], [[11, 12]])
                torch.testing.assert_close(found.logprobs[i], one.logprobs[0], atol=1e-5, rtol=0)
            assert "nothing is shared" in found.stats.notes[0]
    fixed = cf.Model(two, adapter={"kind": 0.5, "brief": -0.5})
    with Scorer(fixed) as scorer:
        found = scorer.score(same, [[11, 12]] * 4)
        one = cf.score(cf.Model(merged(two, {"kind": 0.5, "brief": -0.5})), same[:1], [[11, 12]])
        torch.testing.assert_close(found.logprobs[3], one.logprobs[0], atol=1e-5, rtol=0)
        assert not found.stats.notes


def test_mixes_beside_other_terms(two: PeftModel, batch: Batch) -> None:
    """Mixes, single adapters and the base are rows of one forward."""
    terms = [cf.Model(two, adapter=x) for x in (None, "kind", mix(), {"brief": 0.5})]
    whole = [merged(two, x) for x in ({}, {"kind": 1.0}, {"kind": A[1], "brief": B[1]})]
    whole.append(merged(two, {"brief": 0.5}))
    weights = [0.4, 0.3, 0.8, -0.5]
    out = cf.generate(cf.power_mean(terms, weights, r=0), batch, max_new_tokens=6)
    theirs = cf.generate(
        cf.power_mean(list(map(cf.Model, whole)), weights, r=0), request(batch, 1), max_new_tokens=6
    )
    assert len(out.stats.models) == 1
    assert not out.stats.notes
    assert out.responses[1] == theirs.responses[0]


def test_a_cache_is_of_its_mix(two: PeftModel) -> None:
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]]
    term = cf.Model(two, adapter=mix(0, 1))
    out = cf.generate(term, prompts, max_new_tokens=3, return_cache=True, eos_token_id=-1)
    longer = [[*p, *r, 11] for p, r in zip(prompts, out.responses, strict=True)]
    again = cf.Model(two, adapter=mix(0, 1))  # equal, if not the same
    goes_on = cf.generate(again, longer, max_new_tokens=3, cache=out.cache, eos_token_id=-1)
    anew = cf.generate(term, longer, max_new_tokens=3, eos_token_id=-1)
    assert goes_on.responses == anew.responses
    assert goes_on.stats.models[0].tokens < anew.stats.models[0].tokens
    with pytest.raises(ValueError, match="other models or adapters"):
        cf.generate(cf.Model(two, adapter=mix(1, 0)), longer, max_new_tokens=3, cache=out.cache)


def test_the_hook_and_a_streamer(two: PeftModel, batch: Batch) -> None:
    from transformers import TextStreamer

    class Kept(TextStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: Any) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            pass

    term = cf.Model(two, adapter=mix())
    ours = cf.generate(term, batch, max_new_tokens=4)
    theirs = two.generate(**batch, custom_generate=cf.decode, blend=term._blend(), max_new_tokens=4)
    assert torch.equal(ours.sequences, theirs)
    kept, one = Kept(), request(batch, 0)
    fixed = cf.Model(two, adapter={"kind": A[0], "brief": B[0]})
    cf.generate(fixed, one, max_new_tokens=4, streamer=kept)
    assert kept.ids[one["input_ids"].shape[1] :] == ours.responses[0]


@pytest.mark.parametrize("shape", ["gpt2", "gemma3"])
@pytest.mark.parametrize("embedding", [False, True])
def test_other_shapes_of_models(shape: str, embedding: bool, batch: Batch) -> None:
    names = {"gpt2": ["c_attn", "wte"], "gemma3": ["q_proj", "embed_tokens"]}[shape]
    names = names if embedding else names[:1]
    options = {"fan_in_fan_out": True} if shape == "gpt2" else {}
    model = lora(1, make(shape), "kind", 2, names, **options)
    model = lora(2, model, "brief", 2, names, **options).eval()
    fields: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": -1}
    out = cf.generate(cf.Model(model, adapter=mix()), batch, **fields)
    for i in (0, 3):
        fixed = cf.Model(model, adapter={"kind": A[i], "brief": B[i]})
        one = cf.generate(fixed, request(batch, i), **fields, engine=SIMPLE)
        assert out.responses[i] == one.responses[0]
    assert bool(out.stats.notes) == embedding, out.stats.notes


def test_peft_agrees_where_it_concatenates(two: PeftModel, batch: Batch) -> None:
    """Its other way, `linear`, adds cross terms B_i A_j, and is another model."""
    model = lora(2, lora(1, make(), "kind"), "brief").eval()
    scores = {}
    for how in ("cat", "linear"):
        model.add_weighted_adapter(["kind", "brief"], [0.7, 0.3], how, combination_type=how)
        scores[how] = cf.generate(
            cf.Model(model.eval(), adapter=how), batch, max_new_tokens=1
        ).logprobs
    ours = cf.generate(
        cf.Model(model, adapter={"kind": 0.7, "brief": 0.3}), batch, max_new_tokens=1
    ).logprobs
    torch.testing.assert_close(ours, scores["cat"], atol=1e-5, rtol=0)
    assert (ours - scores["linear"]).abs().max() > 0.1


def test_mixes_are_compared_printed_and_saved(two: PeftModel) -> None:
    term = cf.Model(two, adapter={"kind": 0.7, "brief": [0.25, 1, 2, 3, 4]})
    assert repr(term) == (
        "Model(PeftModelForCausalLM, adapter={'kind': 0.7, 'brief': [0.25, 1, 2, 3, 5 requests]})"
    )
    same = cf.Model(two, adapter={"kind": 0.7, "brief": torch.tensor([0.25, 1, 2, 3, 4])})
    assert term == same
    assert len((term + same).terms) == 1
    assert len((term + cf.Model(two, adapter={"kind": 0.7})).terms) == 2
    saved = (1.0 * term).to_dict()
    assert saved["terms"][0]["adapter"] == {"kind": 0.7, "brief": [0.25, 1, 2, 3, 4]}
    assert saved["terms"][0]["name"] == "kind_brief"
    assert cf.Blend.from_dict(saved, kind_brief=two).terms == (term,)
    saved["terms"][0]["adapter"] = {"kind": "much"}
    with pytest.raises(ValueError, match=r"\['adapter'\]\['kind'\] is 'much'; it must be a number"):
        cf.Blend.from_dict(saved, kind_brief=two)


def test_a_blend_of_a_mix_is_saved_with_its_adapters(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "base")
    lora(2, lora(1, make(), "kind"), "brief").save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = cf.models.with_adapters(base, {n: tmp_path / n for n in ("kind", "brief")})
    term = cf.Model(model, adapter={"kind": 0.5, "brief": [0.5, 1.5]}, name="policy")
    (1.0 * term).save(tmp_path / "blend.json")
    loaded = cf.Blend.load(tmp_path / "blend.json")
    assert loaded.terms[0].adapter == term.adapter
    prompts, fields = [[5, 6, 7], [5, 6, 8]], {"max_new_tokens": 4}
    ours = cf.generate(loaded, prompts, **fields)
    assert ours.responses == cf.generate(term, prompts, **fields).responses
    whole = json.loads((tmp_path / "blend.json").read_text())
    whole["terms"][0]["adapter"]["other"] = 1.0
    (tmp_path / "blend.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"is 'other'; it must be one of \['kind', 'brief'\]"):
        cf.Blend.load(tmp_path / "blend.json")


@pytest.mark.parametrize(
    ("adapter", "error", "says"),
    [
        ({}, ValueError, "adapter is an empty mix"),
        ({"kind": "much"}, TypeError, r"adapter\['kind'\] is a str; it must be a number"),
        ({"kind": float("nan")}, ValueError, r"adapter\['kind'\] is nan; it must be finite"),
        ({"kind": [1.0, float("inf")]}, ValueError, r"adapter\['kind'\]\[1\] is inf"),
        ({"kind": torch.tensor([1.0, float("inf")])}, ValueError, r"\[1, inf\]; it must be finite"),
        ({"kind": torch.ones(2, 2)}, ValueError, r"has shape \[2, 2\]; it must be \[requests\]"),
        ({"kind": [1, 2], "brief": [1]}, ValueError, r"\[2\] for 'kind' and \[1\] for 'brief'"),
        ({"kin": 1.0}, ValueError, "adapter is 'kin', which the PeftModelForCausalLM does not"),
        ({"active": 1.0}, ValueError, "adapter mixes 'active'; a mix must have the names of"),
        ({1: 1.0}, TypeError, "adapter has the key 1; it must be an adapter's name"),
    ],
)
def test_mistakes(two: PeftModel, adapter: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        cf.Model(two, adapter=adapter)


def test_mistakes_of_a_call(two: PeftModel, batch: Batch) -> None:
    with pytest.raises(ValueError, match=r"adapter of kind has weights \[2\]; they must be \[4\]"):
        cf.generate(cf.Model(two, adapter={"kind": [1.0, 2.0]}), batch, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"use_dora": True}, NotImplementedError, "'odd', a variant of LoRA"),
        ({"modules_to_save": ["lm_head"]}, NotImplementedError, "'odd', which trains whole mod"),
        ({"bias": "all"}, ValueError, "adapter is a mix, but adapter 'odd' was trained with bias"),
    ],
)
def test_what_has_no_sum_of_deltas(options: Any, error: type[Exception], says: str) -> None:
    model = lora(1, make(), "odd", **options).eval()
    with pytest.raises(error, match=says):
        cf.Model(model, adapter={"odd": 0.5})


def test_other_kinds_of_adapters() -> None:
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(make(), config, "odd")
    with pytest.raises(NotImplementedError, match=r"'odd', which has a layer of .*ia3\.layer\.Lin"):
        cf.Model(model, adapter={"odd": 0.5})


def test_biases_of_lora_itself_are_mixed(batch: Batch) -> None:
    options: dict[str, Any] = {"modules": ["c_attn"], "fan_in_fan_out": True}
    model = lora(1, make("gpt2"), "kind", lora_bias=True, **options)
    model = lora(2, model, "brief", **options).eval()
    out = cf.generate(cf.Model(model, adapter=mix()), batch, max_new_tokens=4)
    fixed = cf.Model(model, adapter={"kind": A[2], "brief": B[2]})
    one = cf.generate(fixed, request(batch, 2), max_new_tokens=4)
    assert out.responses[2] == one.responses[0]
    assert "has a bias" in out.stats.notes[0]


def test_a_model_that_lays_rows_in_one_dimension(batch: Batch) -> None:
    model = lora(2, lora(1, make(), "kind"), "brief").eval()
    layer = model.get_base_model().model.layers[0].mlp
    own = layer.forward
    layer.forward = lambda x: own(x.flatten(0, 1)).view_as(x)
    term = cf.Model(model, adapter=mix())
    with pytest.raises(NotImplementedError, match=r"layers\.0\.mlp\.down_proj does not tell"):
        cf.generate(term, batch, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="does not tell the requests of a batch apart"):
        cf.generate(term, [[5], [6], [7], [8]], max_new_tokens=2)
    fixed = cf.Model(model, adapter={"kind": A[0], "brief": B[0]})
    plain = lora(2, lora(1, make(), "kind"), "brief").eval()
    theirs = cf.Model(plain, adapter={"kind": A[0], "brief": B[0]})
    fields: dict[str, Any] = {"max_new_tokens": 2}
    ours = cf.generate(fixed, batch, **fields)
    assert ours.responses == cf.generate(theirs, batch, **fields).responses


def test_a_mix_is_read_once() -> None:
    weights = torch.tensor([0.5, 1.0])
    made = Mix.of({"kind": weights})
    weights[0] = 7
    assert made.plain() == {"kind": [0.5, 1.0]}
    assert made.requests == 2
