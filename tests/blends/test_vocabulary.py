"""Whether models speak of the same tokens, by their tokenizers or else by their sizes."""

from __future__ import annotations

import gc
import weakref

import pytest
from crossfade.blends import vocabulary
from crossfade.blends.blend import Model, ValueHead, as_blend
from crossfade.blends.vocabulary import check_vocabularies
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]


def lm(size: int = 64) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )


def tokenizer(words=WORDS, **changed: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the places of the words, but for those in `changed`."""
    vocab = {w: i for i, w in enumerate(words)} | changed
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="w0")))


def test_without_tokenizers_the_smallest_model_counts():
    """One family's models are padded to different sizes; their ids are taken to mean the same."""
    assert check_vocabularies(as_blend(lm(64))) == 64
    assert check_vocabularies(Model(lm(64)) + Model(lm(72)) + ValueHead(lm(128))) == 64
    assert check_vocabularies(Model(lm(64)) + ValueHead(lm(48))) == 48


def test_padding_past_the_tokenizer_is_cut():
    assert check_vocabularies(as_blend(lm(64)), tokenizer()) == 60
    assert check_vocabularies(as_blend(Model(lm(64), tokenizer=tokenizer()))) == 60
    assert check_vocabularies(Model(lm(64)) + Model(lm(72), tokenizer=tokenizer())) == 60


def test_a_tokenizer_with_more_tokens_than_the_model():
    """Tokens without a column cannot be written, so the size of the model counts."""
    assert check_vocabularies(as_blend(lm(48)), tokenizer()) == 48


def test_ids_with_gaps_count_to_the_highest():
    """To count to len(tokenizer) would leave real tokens out."""
    gaps = tokenizer(WORDS, extra=62)
    assert len(gaps) == 61
    assert check_vocabularies(as_blend(lm(64)), gaps) == 63


def test_added_tokens_count():
    one = tokenizer()
    assert check_vocabularies(as_blend(lm(64)), one) == 60
    one.add_tokens(["new"])
    assert check_vocabularies(as_blend(lm(64)), one) == 61  # the tokenizer is read again


def test_equal_tokenizers():
    blend = Model(lm(), tokenizer=tokenizer()) - Model(lm(), tokenizer=tokenizer()) + Model(lm())
    assert check_vocabularies(blend, tokenizer()) == 60


def swapped() -> PreTrainedTokenizerFast:
    return tokenizer([*WORDS[:7], WORDS[8], WORDS[7], *WORDS[9:]])


def test_the_first_difference_is_named():
    blend = Model(lm(), tokenizer=tokenizer(), name="a") + Model(
        lm(), tokenizer=swapped(), name="b"
    )
    with pytest.raises(ValueError, match="token 7 is 'w7' for a and 'w8' for b"):
        check_vocabularies(blend)


def test_the_inputs_tokenizer_is_compared():
    blend = Model(lm(), name="a") + Model(lm(), tokenizer=swapped(), name="b")
    with pytest.raises(ValueError, match="token 7 is 'w7' for the inputs and 'w8' for b"):
        check_vocabularies(blend, tokenizer())


def test_values_are_compared():
    blend = Model(lm(), tokenizer=tokenizer(), name="a") + ValueHead(
        lm(), tokenizer=swapped(), name="q"
    )
    with pytest.raises(ValueError, match="'w7' for a and 'w8' for q"):
        check_vocabularies(blend)


def test_an_id_that_one_tokenizer_lacks_is_padding():
    short, long = tokenizer(WORDS[:50]), tokenizer()
    blend = Model(lm(), tokenizer=short, name="a") + Model(lm(), tokenizer=long, name="b")
    assert check_vocabularies(blend) == 50
    gap = tokenizer([*WORDS[:7], *WORDS[8:]])  # all ids from 7 on have moved, so 59 is free
    with pytest.raises(ValueError, match="token 7 is 'w7' for a and 'w8' for b"):
        check_vocabularies(
            Model(lm(), tokenizer=long, name="a") + Model(lm(), tokenizer=gap, name="b")
        )
    hole = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            WordLevel({w: i for i, w in enumerate(WORDS) if i != 7}, unk_token="w0")
        )
    )
    assert check_vocabularies(Model(lm(), tokenizer=long) + Model(lm(), tokenizer=hole)) == 60


def test_a_difference_says_what_to_do():
    blend = Model(lm(), tokenizer=tokenizer(), name="a") + Model(
        lm(), tokenizer=swapped(), name="b"
    )
    with pytest.raises(ValueError, match="leave the tokenizer of b out"):
        check_vocabularies(blend)
    assert check_vocabularies(Model(lm(), tokenizer=tokenizer()) + Model(lm())) == 60


def test_more_than_padding_is_refused():
    """So large a difference is more than padding, and no tokenizer says that ids mean the same."""
    size = "vocabularies differ: large has 3,000 columns and small 1,000, more than padding"
    large, small = Model(lm(3000), name="large"), Model(lm(1000), name="small")
    with pytest.raises(ValueError, match=size):
        check_vocabularies(large + small)
    with pytest.raises(ValueError, match=size):  # the inputs' tokenizer says nothing of the models
        check_vocabularies(large + small, tokenizer())
    with pytest.raises(ValueError, match="small has 1,000 columns and large 3,000"):
        check_vocabularies(small + ValueHead(lm(3000), name="large"))
    with pytest.raises(ValueError, match=size):
        check_vocabularies(Model(lm(3000), tokenizer=tokenizer(), name="large") + small)
    # padding: the sizes of Qwen2 differ by 128, those of Pythia by 384
    assert check_vocabularies(Model(lm(3000)) + Model(lm(3384))) == 3000


def test_tokenizers_vouch_for_models_of_other_sizes():
    words = [f"w{i}" for i in range(3000)]
    large, small = tokenizer(words), tokenizer(words[:1000])
    blend = Model(lm(3000), tokenizer=large) + Model(lm(1000), tokenizer=small)
    assert check_vocabularies(blend) == 1000


@pytest.mark.parametrize(("columns", "words"), [(1000, 3000), (3000, 60)])
def test_the_tokenizer_of_another_model(columns, words):
    other = tokenizer([f"w{i}" for i in range(words)])
    with pytest.raises(ValueError, match=f"tokenizer of the inputs has {words:,} tokens"):
        check_vocabularies(as_blend(Model(lm(columns), name="a")), other)


def test_tokens_that_no_model_can_write_do_not_matter():
    """A padding token that was added past the models' columns changes nothing."""
    extended = tokenizer()
    extended.add_special_tokens({"pad_token": "[PAD]"})
    blend = Model(lm(60), tokenizer=tokenizer()) + Model(lm(60), tokenizer=extended)
    assert check_vocabularies(blend) == 60


def test_reading_is_done_once(monkeypatch):
    one, other = tokenizer(), tokenizer()
    blend = Model(lm(), tokenizer=one) + Model(lm(), tokenizer=other)
    reads = []
    read = vocabulary._tokens
    monkeypatch.setattr(vocabulary, "_tokens", lambda t: reads.append(t) or read(t))
    for _ in range(3):
        check_vocabularies(blend)
    assert [id(t) for t in reads] in ([id(other), id(one)], [id(one), id(other)])


def test_tokenizers_are_not_kept_alive():
    one = tokenizer()
    check_vocabularies(as_blend(lm()), one)
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None


def test_bad_tokenizer():
    with pytest.raises(TypeError, match="tokenizer is a str"):
        check_vocabularies(as_blend(lm()), "gpt2")


def test_no_size_at_all():
    class Own(nn.Module):
        config = object()

        def forward(self, input_ids):
            return input_ids

    with pytest.raises(ValueError, match="config of own has no vocab_size"):
        check_vocabularies(as_blend(Model(Own(), name="own")))
    assert check_vocabularies(as_blend(Own()), tokenizer()) == 60
