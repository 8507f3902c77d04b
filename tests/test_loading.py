"""A blend of the command line may be a file of `Blend.save`, which names its models itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.cli import main
from crossfade.loading import Plan
from tiny_models import make, make_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and files of blends."""
    folder = tmp_path_factory.mktemp("home")
    terms = []
    for seed, name in enumerate(("base", "tuned")):
        make("llama", seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
        model, tokenizer = cf.models.load(folder / name)
        terms.append(cf.Model(model, tokenizer=tokenizer, name=name))
    base, tuned = terms
    blend = (base + 0.8 * (tuned - base)).within(cf.Support(top_k=9))
    blend.save(folder / "blend.json")
    (base + torch.tensor([0.5, 0.1]) * tuned).save(folder / "each.json")
    return folder


def test_a_file_in_place_of_a_formula(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(home / "blend.json")
    plan = Plan.read([], f" {file} ")
    plan.check()
    loaded = plan.load()
    assert loaded.formula == "(0.2*base + 0.8*tuned).within(Support(term=0, top_k=9))"
    assert loaded.blend().weights == cf.Blend.load(file).weights != (0.2, 0.8)
    assert Plan.read([], file).load(dtype="bfloat16").blend().terms[0].model.dtype is torch.bfloat16
    arguments = ["--max-new-tokens", "4", "--no-chat", "--temperature", "0"]
    assert main(["generate", "the film", "--blend", file, *arguments]) == 0
    (text,) = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert [text] == cf.generate(loaded.blend(), ["the film"], max_new_tokens=4).text


def test_a_value_names_the_files_terms(home: Path) -> None:
    plan = Plan.read([], str(home / "blend.json"), value="w * (tuned - base)", fader=["w=0.5"])
    plan.check()
    loaded = plan.load()
    (ratio,) = loaded.value.values
    assert (ratio.tuned, ratio.ref) == (loaded.terms["tuned"], loaded.terms["base"])


@pytest.mark.parametrize(
    ("file", "arguments", "match"),
    [
        ("each.json", {}, r"tuned has 2 weights, one a request; on the command line each must be"),
        ("blend.json", {"fader": ["w=1"]}, "--fader w=... is given, but --blend .* does not use"),
        ("blend.json", {"fader": ["base=1"]}, "the name base is given twice"),
        ("blend.json", {"model": ["base=smollm2"]}, "the name base is given twice"),
        ("blend.json", {"system": ["base=x"]}, "--system names 'base'; a saved blend has its own"),
        ("base/config.json", {}, r"config\.json has"),
    ],
)
def test_mistakes(file: str, arguments: dict[str, Any], match: str, home: Path) -> None:
    arguments = {"model": [], **arguments}
    with pytest.raises(ValueError, match=match):
        Plan.read(blend=str(home / file), **arguments).check()
