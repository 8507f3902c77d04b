"""A pair that cannot be judged says why, and the others of its batch are judged as if alone."""

from __future__ import annotations

import crossfade as cf
import pytest
import torch
from crossfade.policies.self_judge import JudgeTemplate
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<unk>", "A", "B", "bad", *"cdefghij"]
PLAIN = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    found.chat_template = PLAIN
    return found


def judge() -> cf.Judge:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
            max_position_embeddings=90,
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[WORDS.index("bad")] = torch.nan
    return cf.Judge(model, tokenizer(), principles=["helpful", "honest"])


def test_each_pair_says_why() -> None:
    contexts, firsts = ["c"] * 5, ["d e", " \n", "d bad", "d e", "e " * 200]
    seconds = ["f g", "f", "f", "", "f"]
    with pytest.warns(RuntimeWarning, match="was not judged") as caught:
        found = judge()(contexts, firsts, seconds)
    assert found.reasons == (
        None,
        "its first answer is ' \\n', without a word",
        "the probability of a label is not a number",
        "its second answer is '', without a word",
        "its prompt has 253 tokens, and the context of model0 is 90",
    )
    assert found.failed.tolist() == [False, True, True, True, True]
    assert found.preference.isnan().tolist() == found.failed.tolist()
    assert [f"pair {i} was not judged: {why}" for i, why in enumerate(found.reasons) if why] == [
        str(w.message) for w in caught
    ]
    alone = judge()(["c"], ["d e"], ["f g"])
    torch.testing.assert_close(found.orders[:1], alone.orders, atol=1e-6, rtol=0)


def test_no_pair_at_all() -> None:
    found = judge()([], [], [])
    assert found.orders.shape == (0, 2, 2, 2)
    assert (len(found), found.preference.tolist()) == (0, [])


def test_principles_need_a_place_in_the_template() -> None:
    form = JudgeTemplate(question="Which is better?", prefix="It is", principles={"a": "b"})
    assert form.phrases() == {None: form.principle}
    with pytest.raises(ValueError, match=r"principles is \['a'\], and the template asks the same"):
        form.phrases(["a"])
