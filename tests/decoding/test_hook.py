"""`model.generate(..., custom_generate=cf.decode, blend=...)` is `cf.generate`."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.settings import Sampling, split_processors
from streamers import Kept
from tiny_models import make, make_letters, make_tokenizer
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

Batch = dict[str, torch.Tensor]
CHATS: list[Any] = [
    [{"role": "user", "content": "the film"}],
    [{"role": "user", "content": "a very dull plot"}],
]


@pytest.fixture(scope="module")
def blend(trio: list[PreTrainedModel]) -> cf.Blend:
    base, tuned, ref = map(cf.Model, trio)
    return base + 0.8 * (tuned - ref)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"eos_token_id": [20, 30], "pad_token_id": 4},
        {"do_sample": True, "seed": 3, "top_k": 0},
        {"do_sample": True, "seed": 3, "top_k": 5, "top_p": 0.8, "temperature": 0.7, "min_p": 0.05},
        {"do_sample": True, "seed": [3, 4, 5, 6], "top_k": 9, "repetition_penalty": 1.4},
        {"do_sample": True, "seed": 3, "top_k": 0, "num_return_sequences": 3},
        {"do_sample": True, "seed": 3, "top_k": 7, "typical_p": 0.8},
        {"do_sample": True, "seed": 3, "top_k": 7, "renormalize_logits": True},
    ],
    ids=lambda a: "+".join(a) or "greedy",
)
def test_hook_is_generate(
    arguments: dict[str, Any], blend: cf.Blend, base: PreTrainedModel, batch: Batch
) -> None:
    theirs = base.generate(
        **batch, custom_generate=cf.decode, blend=blend, max_new_tokens=12, **arguments
    )
    ours = cf.generate(blend, batch, max_new_tokens=12, **arguments)
    assert torch.equal(theirs, ours.sequences)


def test_weights_of_each_request(
    base: PreTrainedModel, trio: list[PreTrainedModel], batch: Batch
) -> None:
    blend = cf.Model(base) + torch.tensor([0.0, 0.5, 1.0, 1.5]) * cf.Model(trio[1])
    arguments: dict[str, Any] = {"do_sample": True, "seed": 1, "top_k": 0, "max_new_tokens": 6}
    theirs = base.generate(
        **batch, custom_generate=cf.decode, blend=blend, num_return_sequences=2, **arguments
    )
    ours = cf.generate(blend, batch, num_return_sequences=2, **arguments)
    assert torch.equal(theirs, ours.sequences)


def test_hugging_faces_default_top_k_stays(base: PreTrainedModel) -> None:
    arguments: dict[str, Any] = {
        "do_sample": True,
        "temperature": 50.0,
        "num_return_sequences": 400,
        "max_new_tokens": 1,
        "seed": 1,
    }
    drawn = base.generate(
        torch.tensor([[5, 6]]), custom_generate=cf.decode, blend=base, **arguments
    )
    assert len(set(drawn[:, -1].tolist())) == 50


def test_returns_what_generate_returns(
    blend: cf.Blend, base: PreTrainedModel, batch: Batch
) -> None:
    out = base.generate(
        **batch,
        custom_generate=cf.decode,
        blend=blend,
        max_new_tokens=3,
        return_dict_in_generate=True,
    )
    assert isinstance(out, GenerateDecoderOnlyOutput)
    plain = base.generate(**batch, custom_generate=cf.decode, blend=blend, max_new_tokens=3)
    assert torch.equal(out.sequences, plain)
    assert out.text is out.kl is out.search_values is out.scores is None
    assert out.stats.tokens == 12


def test_the_dict_has_the_fields_of_an_output(
    blend: cf.Blend, base: PreTrainedModel, batch: Batch, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked: dict[str, Any] = {"return_term_logprobs": True, "kl_to": base, "return_kl_to_base": True}
    asked["return_pushes"] = True
    arguments = {**asked, "do_sample": True, "seed": 5, "top_k": 0, "num_return_sequences": 2}
    theirs = base.generate(
        **batch,
        custom_generate=cf.decode,
        blend=blend,
        blend_tokenizer=tokenizer,
        return_dict_in_generate=True,
        max_new_tokens=6,
        **arguments,
    )
    ours = cf.generate(blend, batch, tokenizer=tokenizer, max_new_tokens=6, **arguments)
    for name in ("sequences", "lengths", "logprobs", "sampled_logprobs", "finished", "failed"):
        assert torch.equal(theirs[name], getattr(ours, name))
    for name in ("term_logprobs", "pushes", "kl", "kl_to_base"):
        assert torch.allclose(theirs[name], getattr(ours, name), atol=1e-5)
    assert theirs.text == ours.text


def test_values_of_a_search_are_one_a_row(base: PreTrainedModel, batch: Batch) -> None:
    value = 2.0 * cf.Reward(lambda prompts, texts: [float(len(t)) for t in texts])
    arguments: dict[str, Any] = {
        "search": cf.ChunkBeamSearch(2, 2, 2, value),
        "do_sample": True,
        "seed": 1,
        "top_k": 0,
        "num_return_sequences": 2,
        "max_new_tokens": 4,
    }
    blend = cf.Model(base, tokenizer=make_tokenizer())
    theirs = base.generate(
        **batch,
        custom_generate=cf.decode,
        blend=blend,
        return_dict_in_generate=True,
        **arguments,
    )
    ours = cf.generate(blend, batch, **arguments)
    assert torch.equal(theirs.sequences, ours.sequences)
    assert torch.equal(theirs.search_values, ours.values.flatten())
    assert torch.equal(theirs.search_value_parts, ours.value_parts.flatten(0, 1))


DRAFTS = ["prompt", "texts", "a term", "another model"]


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "seed": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("kind", DRAFTS)
def test_a_draft_gives_the_same_tokens(
    kind: str, how: dict[str, Any], blend: cf.Blend, base: PreTrainedModel, batch: Batch
) -> None:
    asked: dict[str, Any] = {
        **{"custom_generate": cf.decode, "blend": blend, "max_new_tokens": 9},
        **{"return_dict_in_generate": True, **how},
    }
    plain = base.generate(**batch, **asked)
    copies = len(plain.sequences) // 4
    texts = [row[-9:].tolist() for row in plain.sequences[::copies]]
    draft = {
        "prompt": cf.Draft("prompt", length=3),
        "texts": cf.Draft(texts=texts, length=3),
        "a term": cf.Draft(blend.terms[0], length=3),
        "another model": cf.Draft(make("gpt2", 4), length=3),
    }[kind]
    out = base.generate(**batch, draft=draft, **asked)
    assert torch.equal(out.sequences, plain.sequences)
    torch.testing.assert_close(out.logprobs, plain.logprobs, atol=1e-4, rtol=1e-4)
    assert plain.tokens_by_draft is None
    assert out.tokens_by_draft.shape == (4 * copies,)
    assert out.tokens_by_draft.sum() == out.stats.right
    if kind == "texts":
        assert (out.tokens_by_draft[::copies] > 0).all()
    bare = {**asked, "return_dict_in_generate": False}
    assert torch.equal(base.generate(**batch, draft=draft, **bare), plain.sequences)


def test_what_hugging_face_drops(
    base: PreTrainedModel, batch: Batch, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A function gets none of these, whatever the names of its parameters: ours are others."""
    arrived: dict[str, Any] = {}

    def keep(model: Any, input_ids: torch.Tensor, *, tokenizer=None, streamer=None, **others: Any):
        arrived.update(others, tokenizer=tokenizer, streamer=streamer)
        return input_ids

    kept = Kept()
    dropped = {"streamer": kept, "tokenizer": tokenizer, "synced_gpus": False}
    dropped |= {"assistant_model": base, "assistant_tokenizer": tokenizer}
    base.generate(**batch, custom_generate=keep, max_new_tokens=3, **dropped)
    assert all(arrived.get(name) is None for name in dropped)
    assert kept.told == [batch["input_ids"].tolist()]  # and no end
    with pytest.raises(ValueError, match="we could not locate a tokenizer"):
        base.generate(**batch, custom_generate=keep, stop_strings=["a"], max_new_tokens=3)


def test_a_streamer_that_arrives(blend: cf.Blend, base: PreTrainedModel, batch: Batch) -> None:
    theirs, ours = Kept(), Kept()
    base.generate(
        **batch, custom_generate=cf.decode, blend=blend, blend_streamer=theirs, max_new_tokens=4
    )
    cf.generate(blend, batch, streamer=ours, max_new_tokens=4)
    assert theirs.told == ours.told
    assert theirs.told[-1] == "end"


@pytest.mark.parametrize("stops", ["a", ["ab", "nd"], [["e"], None, "ad", ["n", "t"]]])
def test_stop_strings_that_arrive(
    stops: Any, blend: cf.Blend, base: PreTrainedModel, batch: Batch
) -> None:
    arguments: dict[str, Any] = {"do_sample": True, "seed": 2, "top_k": 0, "max_new_tokens": 40}
    theirs = base.generate(
        **batch,
        custom_generate=cf.decode,
        blend=blend,
        blend_tokenizer=make_letters(),
        blend_stop_strings=stops,
        **arguments,
    )
    ours = cf.generate(blend, batch, tokenizer=make_letters(), stop_strings=stops, **arguments)
    assert torch.equal(theirs, ours.sequences)
    plain = cf.generate(blend, batch, **arguments)
    assert ours.lengths.sum() < plain.lengths.sum()


def test_a_config_and_a_limit_of_time(blend: cf.Blend, base: PreTrainedModel, batch: Batch) -> None:
    config = GenerationConfig(max_new_tokens=5, do_sample=True, top_k=0, pad_token_id=0)
    hook: dict[str, Any] = {"custom_generate": cf.decode, "blend": blend, "seed": 4}
    theirs = base.generate(**batch, generation_config=config, **hook)
    ours = cf.generate(blend, batch, generation_config=config, seed=4)
    assert torch.equal(theirs, ours.sequences)
    cut = base.generate(**batch, **hook, max_new_tokens=5, max_time=-1.0)
    assert cut.shape[1] == 10  # The time is looked at after a token.


class TestBlendInputs:
    """Terms with system prompts read the texts or chats that the ids were made of."""

    @pytest.fixture
    def ids(self, tokenizer: PreTrainedTokenizerFast) -> Batch:
        return tokenizer.apply_chat_template(
            CHATS,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
        )

    def test_it_is_generate(
        self, base: PreTrainedModel, ids: Batch, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        plain = cf.Model(base, tokenizer=tokenizer)
        kind = cf.Model(base, tokenizer=tokenizer, system="great")
        arguments: dict[str, Any] = {"do_sample": True, "seed": 3, "top_k": 0, "max_new_tokens": 7}
        blend = 0.4 * plain + 0.6 * kind
        theirs = base.generate(
            **ids,
            custom_generate=cf.decode,
            blend=blend,
            blend_inputs=CHATS,
            **arguments,
        )
        ours = cf.generate(blend, CHATS, **arguments)
        assert torch.equal(theirs, ours.sequences)
        alone = cf.generate(plain, CHATS, **arguments)
        assert not torch.equal(theirs[:, : alone.sequences.shape[1]], alone.sequences)

    def test_each_copy_reads_its_request(
        self, base: PreTrainedModel, ids: Batch, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        kind = cf.Model(base, tokenizer=tokenizer, system="great")
        blend = cf.Model(base, tokenizer=tokenizer) + kind
        arguments: dict[str, Any] = {"do_sample": True, "seed": 3, "num_return_sequences": 2}
        arguments |= {"top_k": 0, "max_new_tokens": 5}
        theirs = base.generate(
            **ids,
            custom_generate=cf.decode,
            blend=blend,
            blend_inputs=CHATS,
            **arguments,
        )
        assert torch.equal(theirs, cf.generate(blend, CHATS, **arguments).sequences)

    def test_refusals(
        self, base: PreTrainedModel, ids: Batch, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        kind = cf.Model(base, tokenizer=tokenizer, system="great", name="kind")
        blend = cf.Model(base, tokenizer=tokenizer, name="plain") + kind
        hook: dict[str, Any] = {"custom_generate": cf.decode, "blend": blend, "max_new_tokens": 2}
        with pytest.raises(ValueError, match=r"system of kind is set.* pass blend_inputs="):
            base.generate(**ids, **hook)
        with pytest.raises(ValueError, match=r"system of kl_to\.kind is set"):
            base.generate(
                **ids,
                **{**hook, "blend": base, "kl_to": kind},
                return_dict_in_generate=True,
            )
        with pytest.raises(ValueError, match="blend_inputs has 1 entries; it must have 2"):
            base.generate(**ids, **hook, blend_inputs=CHATS[:1])
        with pytest.raises(ValueError, match=r"blend_inputs of request 1 has .* differ from token"):
            base.generate(**ids, **hook, blend_inputs=[CHATS[0], "something else"])
        with pytest.raises(ValueError, match=r"request 0 has .* as kind, the first term, reads it"):
            base.generate(**ids, **{**hook, "blend": kind}, blend_inputs=CHATS)

    def test_a_prompt_of_its_own(
        self, base: PreTrainedModel, batch: Batch, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """Later terms may have one. The sequences begin with the first term's: it must be the ids,
        else the limit of new tokens and the ids that are returned would be of another prompt."""
        other = cf.Model(base, prompt=[5, 6], name="other")
        blend = cf.Model(base) + other
        hook: dict[str, Any] = {"custom_generate": cf.decode, "max_new_tokens": 4}
        theirs = base.generate(**batch, **hook, blend=blend)
        assert torch.equal(theirs, cf.generate(blend, batch, max_new_tokens=4).sequences)
        with pytest.raises(ValueError, match="prompt of other is set, and it is the first term"):
            base.generate(**batch, **hook, blend=other)
        with_system = cf.Model(base, prompt="a film", system="great", tokenizer=tokenizer)
        blend = cf.Model(base) + with_system
        theirs = base.generate(**batch, **hook, blend=blend)
        assert torch.equal(theirs, cf.generate(blend, batch, max_new_tokens=4).sequences)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_beams": 2}, NotImplementedError, "num_beams=2"),
        ({"use_cache": False}, NotImplementedError, "use_cache"),
        ({"cache_implementation": "static"}, NotImplementedError, "cache_implementation"),
        ({"output_attentions": True}, NotImplementedError, "output_attentions"),
        ({"output_scores": True, "return_dict_in_generate": True}, NotImplementedError, "output_"),
        ({"blend": None}, TypeError, "blend is None"),
        ({"blend": 7}, TypeError, "blend is a int"),
        ({"seed": -2}, ValueError, "seed is -2"),
        ({"kl_to": 7, "return_dict_in_generate": True}, TypeError, "kl_to is a int"),
        ({"return_term_logprobs": True}, ValueError, "pass return_dict_in_generate=True"),
        ({"return_pushes": True}, ValueError, "pass return_dict_in_generate=True"),
        ({"return_kl_to_base": 1}, TypeError, "return_kl_to_base is 1"),
        ({"engine": "simple"}, TypeError, "engine is a str"),
        ({"blend_streamer": print}, TypeError, "blend_streamer is a builtin"),
        ({"blend_stop_strings": ["."]}, ValueError, "no term has a tokenizer; pass blend_tok"),
        ({"blend_stop_strings": 3}, TypeError, "blend_stop_strings is a int"),
    ],
)
def test_refusals(
    arguments: dict[str, Any],
    error: type[Exception],
    match: str,
    blend: cf.Blend,
    base: PreTrainedModel,
    batch: Batch,
) -> None:
    arguments = {"blend": blend, "max_new_tokens": 2, **arguments}
    with pytest.raises(error, match=match):
        base.generate(**batch, custom_generate=cf.decode, **arguments)


def test_refuses_what_only_the_caller_knows(
    blend: cf.Blend, base: PreTrainedModel, batch: Batch
) -> None:
    hook: dict[str, Any] = {"custom_generate": cf.decode, "blend": blend, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="no term of the blend"):
        make("llama", 8).generate(**batch, **hook)
    with pytest.raises(ValueError, match="attention_mask of request 1 is 0 after"):
        base.generate(batch["input_ids"], attention_mask=batch["attention_mask"].flip(1), **hook)
    with pytest.raises(ValueError, match="system of strict"):
        base.generate(**batch, **{**hook, "blend": cf.Model(base, system="a", name="strict")})
    with pytest.raises(NotImplementedError, match="position_ids"):
        base.generate(**batch, **hook, position_ids=torch.arange(9).expand(4, 9) + 3)
    cache = DynamicCache(config=base.config)
    base(batch["input_ids"][:1, :2], past_key_values=cache, attention_mask=torch.ones(1, 2))
    with pytest.raises(NotImplementedError, match="past_key_values"):
        base.generate(batch["input_ids"][:1], past_key_values=cache, **hook)


def test_inputs_embeds_are_refused_by_name(blend: cf.Blend, base: PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    hook: dict[str, Any] = {"custom_generate": cf.decode, "blend": blend, "max_new_tokens": 2}
    hook["inputs_embeds"] = base.get_input_embeddings()(ids)
    for inputs in ({}, {"input_ids": ids}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(NotImplementedError, match=r"inputs_embeds is not .*pass input_ids"):
            base.generate(**inputs, **hook)


WARPERS = [
    TemperatureLogitsWarper(0.5),
    TopKLogitsWarper(5),
    TopPLogitsWarper(0.9),
    MinPLogitsWarper(0.1),
]


@pytest.mark.parametrize(
    ("processors", "kept", "taken"),
    [
        (WARPERS, 0, Sampling(True, 0.5, 5, 0.9, 0.1)),
        ([*WARPERS, LogitNormalization()], 0, Sampling(True, 0.5, 5, 0.9, 0.1)),
        (WARPERS[1:2], 0, Sampling(True, top_k=5)),
        # The kernel has one order: what stands before one that is out of order runs as it is.
        ([WARPERS[2], WARPERS[1]], 1, Sampling(True, top_k=5)),
        ([WARPERS[1], WARPERS[1]], 1, Sampling(True, top_k=5)),
        # Typical sampling reads what the others have left, so that they stay before it.
        ([*WARPERS[:2], TypicalLogitsWarper(0.9)], 3, Sampling(True)),
        # The kernel knows neither a minimum of tokens to keep nor a finite filter value.
        ([TopPLogitsWarper(0.9, min_tokens_to_keep=2)], 1, Sampling(True)),
        ([MinPLogitsWarper(0.1, filter_value=-1e4)], 1, Sampling(True)),
    ],
)
def test_warpers_go_to_the_kernel(processors: list[Any], kept: int, taken: Sampling) -> None:
    rest, sampling = split_processors(LogitsProcessorList(processors), do_sample=True)
    assert len(rest) == kept
    assert sampling == taken
