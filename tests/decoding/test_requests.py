"""The forms that inputs may have, and what each term reads of them."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import numpy as np
import pytest
import torch
from crossfade.decoding.inputs import left_pad, read_requests, right_pad, term_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import PAD, make, make_tokenizer
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerFast

TEXT = "the film was"
CHAT = [{"role": "user", "content": "the film"}]
Tokenizer = PreTrainedTokenizerFast
TOKENIZER = make_tokenizer()


def read(inputs: Any, tokenizer: Tokenizer, **options: Any) -> list[str]:
    prompts = term_prompts(read_requests(inputs), term="base", tokenizer=tokenizer, **options)
    return tokenizer.batch_decode(prompts.unpadded())


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (TEXT, [TEXT]),
        ([TEXT, "a plot"], [TEXT, "a plot"]),
        (CHAT, ["<bos> user : the film <eos> <bos> assistant :"]),
        ([CHAT, TEXT], ["<bos> user : the film <eos> <bos> assistant :", TEXT]),
        # A chat that ends with the assistant is continued, not answered.
        (
            [*CHAT, {"role": "assistant", "content": "was"}],
            ["<bos> user : the film <eos> <bos> assistant : was"],
        ),
        ([11, 10], ["the film"]),
        ([[11, 10], [12]], ["the film", "a"]),
        ((11, 10), ["the film"]),
        ([torch.tensor([11, 10]), torch.tensor([12])], ["the film", "a"]),
        (torch.tensor([11, 10]), ["the film"]),
        (
            torch.tensor([[PAD, 12], [11, 10]]),
            ["a", "the film"],
        ),  # The mask is read off the padding, as in Hugging Face.
        (
            {"input_ids": [[PAD, 12], [11, 10]], "attention_mask": [[0, 1], [1, 1]]},
            ["a", "the film"],
        ),
        ({"input_ids": [11, 10], "attention_mask": [1, 1]}, ["the film"]),
        (BatchEncoding({"input_ids": torch.tensor([[11, 10]])}), ["the film"]),
    ],
)
def test_forms(inputs: Any, expected: list[str], tokenizer: Tokenizer) -> None:
    requests = read_requests(inputs, pad=PAD, eos=[1])
    prompts = term_prompts(requests, term="base", tokenizer=tokenizer)
    assert tokenizer.batch_decode(prompts.unpadded()) == expected
    assert prompts.mask[:, -1].all(), "prompts are padded on the left"


class Count(int):
    """An integer that is no `int`, as numpy's are."""


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (np.array([11, 10]), ["the film"]),
        (np.array([[PAD, 12], [11, 10]]), ["a", "the film"]),
        (np.array([[11, 10]], dtype=np.uint8)[:, ::-1], ["film the"]),
        (np.array([TEXT, "a plot"]), [TEXT, "a plot"]),
        (np.array([[11, 10], [12]], dtype=object), ["the film", "a"]),
        ([np.array([11, 10]), np.array([12])], ["the film", "a"]),
        ([[np.int64(11), np.uint16(10)]], ["the film"]),
        ([np.int32(11), Count(10)], ["the film"]),
        ([[torch.tensor(11), torch.tensor(10)]], ["the film"]),
        (torch.tensor([[11, 10]], dtype=torch.uint16), ["the film"]),
        (torch.tensor([[11, 10]], dtype=torch.int8), ["the film"]),
        (range(10, 12), ["film the"]),
        (
            {"input_ids": np.array([[PAD, 12]]), "attention_mask": np.array([[0, 1]])},
            ["a"],
        ),
        ({"input_ids": [11, 10], "attention_mask": torch.tensor([0.0, 1.0])}, ["film"]),
        (tuple(CHAT), ["<bos> user : the film <eos> <bos> assistant :"]),
        # These are parts of a text, which this template would print as Python does.
        (
            [{"role": "user", "content": [{"type": "text", "text": "the "}, "film"]}],
            ["<bos> user : the film <eos> <bos> assistant :"],
        ),
    ],
    ids=lambda x: "" if isinstance(x, list) else None,
)
def test_more_forms(inputs: Any, expected: list[str], tokenizer: Tokenizer) -> None:
    requests = read_requests(inputs, pad=PAD, eos=[1])
    prompts = term_prompts(requests, term="base", tokenizer=tokenizer)
    assert tokenizer.batch_decode(prompts.unpadded()) == expected


def test_padding_that_is_eos_is_read_as_in_hugging_face(base: PreTrainedModel) -> None:
    # No mask can be read off such padding, which is part of the prompt then.
    ids = torch.tensor([[1, 1, 12], [11, 10, 9]])
    arguments = {"max_new_tokens": 5, "pad_token_id": 1, "eos_token_id": 1}
    assert torch.equal(
        cf.generate(base, ids, **arguments).sequences, base.generate(ids, **arguments)
    )


def test_system_prompts(tokenizer: Tokenizer) -> None:
    system = "very bright"
    head = "<bos> system : very bright <eos> <bos> user : "
    tail = " <eos> <bos> assistant :"
    assert read(TEXT, tokenizer, system=system) == [f"{head}{TEXT}{tail}"]
    assert read([CHAT], tokenizer, system=system) == [f"{head}the film{tail}"]
    both = [{"role": "system", "content": "dull"}, *CHAT]
    assert read([both], tokenizer, system=system) == [
        f"<bos> system : very bright dull <eos> <bos> user : the film{tail}"
    ]
    with pytest.raises(ValueError, match="system of base"):
        read([[11, 10]], tokenizer, system=system)
    each = ["very bright", "dull"]
    assert read([TEXT, CHAT], tokenizer, system=each) == [
        *read([TEXT], tokenizer, system="very bright"),
        *read([CHAT], tokenizer, system="dull"),
    ]
    with pytest.raises(ValueError, match="system of base has 2 entries; it must have 1, one a req"):
        read([TEXT], tokenizer, system=each)


def test_own_prompts(tokenizer: Tokenizer) -> None:
    two = [TEXT, "a plot"]
    assert read(two, tokenizer, prompt="dull") == ["dull", "dull"]
    assert read(two, tokenizer, prompt=["dull", "bright"]) == ["dull", "bright"]
    assert read(two, tokenizer, prompt=[11, 10]) == ["the film"] * 2
    assert read(two, tokenizer, prompt=lambda text: f"very {text}") == [
        "very the film was",
        "very a plot",
    ]
    assert read(two, tokenizer, prompt="dull", system="very")[0].startswith("<bos> system : very")
    with pytest.raises(ValueError, match="prompt of base has 3 entries"):
        read(two, tokenizer, prompt=["a", "b", "c"])
    with pytest.raises(TypeError, match="prompt of base for request 1"):
        read(two, tokenizer, prompt=lambda text: text if text == TEXT else None)


def test_terms_with_prompts_of_their_own_lengths(
    base: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    """One model under three system prompts, as in the demo, against unpadded forwards."""
    terms = [cf.Model(base, tokenizer=tokenizer, system=s) for s in ("a", "very bright film", "w9")]
    neutral, bright, dull = terms
    texts = ["the film", "a very very dull plot w20 w21", "cast"]
    blend = neutral + 0.7 * (bright - dull)
    out = cf.generate(blend, texts, max_new_tokens=6)
    for i, text in enumerate(texts):
        heads = [
            tokenizer(
                f"<bos> system : {t.system} <eos> <bos> user : {text} <eos> <bos> assistant :"
            )
            for t in terms
        ]
        new: list[int] = []
        with torch.no_grad():
            for token in out.responses[i]:
                z = [base(torch.tensor([h["input_ids"] + new])).logits[0, -1] for h in heads]
                assert int((z[0] + 0.7 * (z[1] - z[2])).argmax()) == token
                new.append(token)
        prompt = out.sequences[i, : out.prompt_length].tolist()
        assert prompt[-len(heads[0]["input_ids"]) :] == heads[0]["input_ids"]
    assert out.text == tokenizer.batch_decode(out.responses, skip_special_tokens=True)
    # The three terms are rows of one batch, so that the model ran once a step, not three times.
    (stats,) = out.stats.models
    assert stats.names == blend.names
    assert stats.forwards == 1 + out.logprobs.shape[1]  # prompts, then steps


@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        ([], ValueError, "inputs is empty"),
        (3, TypeError, "inputs is a int"),
        ([TEXT, 3], TypeError, r"inputs\[1\]"),
        ([[11], []], TypeError, r"inputs\[1\] is empty"),
        ([[1.5]], TypeError, r"inputs\[0\]"),
        ([[True]], TypeError, r"inputs\[0\]"),
        (torch.zeros(2, 3), TypeError, "input_ids has dtype"),
        (torch.zeros(2, 0, dtype=torch.long), ValueError, "input_ids has shape"),
        (torch.zeros(2, 2, 2, dtype=torch.long), ValueError, "input_ids has shape"),
        ({"ids": [1]}, ValueError, "must have 'input_ids'"),
        ({"input_ids": [[5]], "pixel_values": [1]}, NotImplementedError, "pixel_values"),
        ({"input_ids": [[5]], "token_type_ids": [[0]]}, NotImplementedError, "token_type_ids"),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 2)},
            ValueError,
            "attention_mask has shape",
        ),
        (
            {"input_ids": [[5, 6], [7, 0]], "attention_mask": [[1, 1], [1, 0]]},
            ValueError,
            "attention_mask of request 1",
        ),
        (
            {"input_ids": [[5, 6], [7, 0]], "attention_mask": [[1, 1], [0, 0]]},
            ValueError,
            "attention_mask of request 1",
        ),
        ({"input_ids": [[5], [7, 0]], "attention_mask": [[1], [1, 1]]}, ValueError, "rectangle"),
        ({"input_ids": ["film"], "attention_mask": [[1]]}, ValueError, "attention_mask is set"),
        (b"film", TypeError, "inputs is a bytes"),
        ([b"film"], TypeError, r"inputs\[0\] is b'film'"),
        ([[5, 2**63]], ValueError, rf"inputs\[0\] has id {2**63}"),
        ([[5], [-(2**64)]], ValueError, rf"inputs\[1\] has id -{2**64}"),
        ({"input_ids": [[2**70]], "attention_mask": [[1]]}, ValueError, "has id"),
        (np.array([[5.0]]), TypeError, "input_ids has dtype torch.float"),
        (np.array([[True]]), TypeError, "input_ids has dtype torch.bool"),
        ([[torch.tensor(True)]], TypeError, r"inputs\[0\]"),
        (torch.zeros(1, 2).to_sparse().long(), ValueError, "input_ids is of layout"),
        (torch.zeros(1, 2, dtype=torch.long, device="meta"), ValueError, "on the device meta"),
        ([torch.zeros(2, dtype=torch.long, device="meta")], ValueError, r"inputs\[0\] is on the"),
        ({"input_ids": [[5, 6]], "attention_mask": [[2, 1]]}, ValueError, "request 0 has 2"),
        (
            {"input_ids": [[5, 6]], "attention_mask": [[float("nan"), 1]]},
            ValueError,
            "request 0 has nan",
        ),
        ({"input_ids": [[5, 6]], "attention_mask": "11"}, ValueError, "attention_mask is '11'"),
        ([{"role": None, "content": "a"}], TypeError, "message 0, has the role None"),
        ([*CHAT, {"role": "user", "content": None}], TypeError, "message 1, has the content None"),
        ([CHAT, [{"role": "user", "content": 3}]], TypeError, r"inputs\[1\], message 0, has"),
        ([{"role": "user", "content": {"type": "text"}}], TypeError, "has the content"),
        ([{"role": "user", "content": [{"type": "text"}]}], TypeError, "has the content"),
        ([{"role": "user", "content": [3]}], TypeError, "has the content"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "a"}]}],
            NotImplementedError,
            "message 0, has a part of the type 'image'",
        ),
        (TEXT, ValueError, "tokenizer is None for model0"),
        (CHAT, ValueError, "tokenizer is None for model0"),
        ([[5, 61]], ValueError, "row 0 has id 61 for model0"),
        ([[5], [-1]], ValueError, "row 1 has id -1 for model0"),
    ],
)
def test_bad_inputs(inputs: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        cf.generate(make(), inputs, max_new_tokens=2)


HALF = "half of a surrogate pair"


@pytest.mark.parametrize(
    "inputs", ["a\ud800", ["film", "\udfff"], [{"role": "user", "content": "\ud800"}]], ids=ascii
)
def test_half_of_a_surrogate_pair(inputs: Any, base: PreTrainedModel, tokenizer: Tokenizer) -> None:
    term = cf.Model(base, tokenizer=tokenizer)
    request = len(inputs) - 1 if isinstance(inputs, list) else 0
    with pytest.raises(ValueError, match=f"request {request}: model0: .* has {HALF}"):
        cf.generate(term, inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match=HALF):
        cf.score(term, inputs, [[5]] * (request + 1))
    with pytest.raises(ValueError, match=rf"responses\[0\]: .* has {HALF}"):
        cf.score(term, ["film"], "a\ud800")
    for own in ({"system": "\ud800"}, {"prompt": "\ud800"}, {"prompt": lambda x: "\ud800"}):
        with pytest.raises(ValueError, match=HALF):
            cf.generate(cf.Model(base, tokenizer=tokenizer, **own), "film", max_new_tokens=2)
    with pytest.raises(ValueError, match=f"stop_strings: .* has {HALF}"):
        cf.generate(term, "film", max_new_tokens=2, stop_strings="\ud800")


def test_a_template_that_refuses_names_the_request(base: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0]['role']) }}"
    with pytest.raises(ValueError, match=r"request 1: the chat template of a cannot .*no wizard"):
        cf.generate(
            cf.Model(base, tokenizer=tokenizer, name="a"),
            ["film", [{"role": "wizard", "content": "film"}]],
            max_new_tokens=2,
        )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "input_ids", "attention_mask"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(JSON, JSON)
def test_whatever_is_given_is_read_or_refused_in_words(inputs: Any, mask: Any) -> None:
    message = "request"
    try:
        requests = read_requests(inputs, mask, pad=PAD, eos=[1])
        term_prompts(requests, term="base", tokenizer=TOKENIZER)
    except (ValueError, TypeError, NotImplementedError) as error:
        message = str(error)
    assert message.startswith(("inputs", "input_ids", "attention_mask", "request", "the prompt of"))


def test_bad_masks_and_empty_texts(base: PreTrainedModel, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([[5, 6]])
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match="attention_mask is given twice"):
        cf.generate(base, {"input_ids": ids, "attention_mask": mask}, attention_mask=mask)
    with pytest.raises(ValueError, match="request 1 has no tokens"):
        cf.generate(base, ["film", ""], tokenizer=tokenizer, max_new_tokens=2)
    ours = cf.generate(
        base, ids.repeat(2, 1), attention_mask=torch.tensor([[0, 1], [1, 1]]), max_new_tokens=3
    )
    assert ours.responses[0] == cf.generate(base, [6], max_new_tokens=3).responses[0]


def test_rows_are_padded_on_either_side() -> None:
    rows = [[7, 9, 30], [40], [5, 6]]
    left = left_pad(rows, 2)
    assert left.ids.tolist() == [[7, 9, 30], [2, 2, 40], [2, 5, 6]]
    assert left.mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert left.unpadded() == rows
    ids, mask = right_pad(rows, -100)
    assert ids.tolist() == [[7, 9, 30], [40, -100, -100], [5, 6, -100]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert {x.dtype for x in (ids, mask, left_pad([[]]).ids)} == {torch.int64}
