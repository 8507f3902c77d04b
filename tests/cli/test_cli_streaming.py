"""Streamed pieces make the text that `generate` gives, whatever tokens it is made of."""

from __future__ import annotations

import pytest
import torch
from crossfade.cli.streaming import Printer
from crossfade.decoding.writing import text_after
from tokenizer_kinds import KINDS, tokenizer_of

PROMPT = "The film was"
TEXT = " very bright \N{GRINNING FACE}\N{SNOWMAN}! It\u2019s fine.\n\nThe end."


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [TEXT, " very bright \N{SNOWMAN}"], ids=["whole", "cut"])
def test_pieces_make_the_text(kind: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the last character is cut, which is printed at the end alone."""
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer(PROMPT)["input_ids"]
    ids = tokenizer(PROMPT + text)["input_ids"][len(prompt) :]
    ids = ids if text == TEXT else ids[:-1]
    printer, pieces = Printer(tokenizer, chat=False), []
    printer.put(torch.tensor([prompt]))
    for token in ids:
        printer.put(torch.tensor([token]))
        pieces.append(capsys.readouterr().out)
    assert not any("\ufffd" in piece for piece in pieces)
    printer.end()
    (whole,) = text_after(tokenizer, [prompt], [ids])
    assert "".join(pieces) + capsys.readouterr().out == whole
    assert sum(map(bool, pieces)) >= 2


def test_an_answer_begins_with_a_letter(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_of("bytes")
    printer = Printer(tokenizer, chat=True)
    printer.put(torch.tensor([tokenizer("hello")["input_ids"]]))
    for token in tokenizer(" \n there it is")["input_ids"]:
        printer.put(torch.tensor([token]))
    printer.end()
    assert capsys.readouterr().out == "there it is"
