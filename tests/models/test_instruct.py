"""A model is one that answers chats if its template closes an answer with one of its ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from crossfade import models
from crossfade.models.instruct import has_template, is_instruct
from tiny_models import make, make_tokenizer

ENDING = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}\n{% endfor %}"


@pytest.fixture
def pair() -> tuple[Any, Any]:
    model, tokenizer = make("llama"), make_tokenizer()
    tokenizer.chat_template = ENDING
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def test_its_template_closes_an_answer_with_an_end(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    assert is_instruct(model, tokenizer)
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    assert is_instruct(model, tokenizer)


@pytest.mark.parametrize("ends", [None, 7, [7, 8]])
def test_a_base_model_may_come_with_a_template(pair: tuple[Any, Any], ends: Any) -> None:
    model, tokenizer = pair
    model.generation_config.eos_token_id = ends
    assert has_template(tokenizer)
    assert not is_instruct(model, tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
        "{% for m in messages %}{{ eos_token }}{{ m['content'] }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ unbalanced",
    ],
)
def test_other_templates(pair: tuple[Any, Any], template: str | None) -> None:
    model, tokenizer = pair
    tokenizer.chat_template = template
    assert not is_instruct(model, tokenizer)
    assert not is_instruct(model, None)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_does_not_hide_the_model(pair: tuple[Any, Any]) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = pair
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert is_instruct(wrapped, tokenizer)


@pytest.mark.model
def test_the_real_model(smollm2_folder: Path) -> None:
    model, tokenizer = models.load(smollm2_folder)
    assert is_instruct(model, tokenizer)
