"""The folder that can be published on the Hugging Face hub: Transformers runs it as it lies."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import lora, make, make_letters, make_tokenizer
from transformers import GenerationConfig

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

FOLDER = Path(__file__).parents[1] / "hub"
BASE, TUNED, REF = make("llama", 0), make("gpt2", 1), make("qwen3", 2)
IDS = torch.tensor([[9, 8, 12], [30, 7, 9]])
GENERATION: dict[str, Any] = {"do_sample": True, "seed": 3, "top_k": 9, "max_new_tokens": 8}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Transformers copies the code into a cache, and asks for the version of the package."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    known = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1.0" if name == "crossfade" else known(name)
    )


def run(model: Any, **arguments: Any) -> Any:
    return model.generate(
        IDS, custom_generate=str(FOLDER), trust_remote_code=True, **GENERATION, **arguments
    )


def test_a_formula() -> None:
    terms = {"tuned": TUNED, "ref": REF, "w": 0.8}
    theirs = run(BASE, formula="base + w * (tuned - ref)", terms=terms)
    blend = cf.Model(BASE) + 0.8 * (cf.Model(TUNED) - cf.Model(REF))
    assert torch.equal(theirs, cf.generate(blend, IDS, **GENERATION).sequences)


def test_the_readmes_example() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)
    names = {"base": BASE, "tuned": TUNED, "ref": REF, "REPOSITORY": str(FOLDER)}
    names["tokenizer"] = make_tokenizer()
    exec(code, names)
    assert names["ids"].shape[0] == 1


def test_adapters_are_terms() -> None:
    model = lora(2, lora(1, make("llama", 0), "kind"), "brief")
    formula = "base + 0.5 * (kind - base) + 0.5 * (brief - base)"
    theirs = run(model, formula=formula)
    names = {name: cf.Model(model, adapter=name) for name in ("kind", "brief")}
    blend = cf.parse(formula, base=cf.Model(model, adapter=None), **names)
    assert torch.equal(theirs, cf.generate(blend, IDS, **GENERATION).sequences)


def test_what_a_function_does_not_get_arrives_here() -> None:
    told: list[Any] = []

    class Kept:
        def put(self, value: torch.Tensor) -> None:
            told.append(value.tolist())

        def end(self) -> None:
            told.append("end")

    stops: dict[str, Any] = {"tokenizer": make_letters(), "stop_strings": ["a", "nd"]}
    theirs = run(BASE, blend=cf.Model(BASE), streamer=Kept(), **stops)
    ours = cf.generate(BASE, IDS, **stops, **GENERATION)
    assert torch.equal(theirs, ours.sequences)
    assert told[0] == IDS.tolist()
    assert told[-1] == "end"
    config = GenerationConfig(stop_strings=["a", "nd"], **{**GENERATION, "seed": None})
    theirs = BASE.generate(
        IDS,
        generation_config=config,
        custom_generate=str(FOLDER),
        trust_remote_code=True,
        blend=BASE,
        tokenizer=make_letters(),
        seed=3,
    )
    assert torch.equal(theirs, ours.sequences)
    assert config.stop_strings == ["a", "nd"]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, TypeError, "give a formula"),
        ({"formula": "base", "blend": BASE}, TypeError, "give a formula"),
        ({"blend": BASE, "terms": {}}, TypeError, "terms are given without a formula"),
        ({"formula": "base", "terms": {"base": TUNED}}, ValueError, "'base', which is the model"),
        ({"formula": "a", "terms": {"a": "gpt2"}}, TypeError, "'gpt2'; it must be a loaded model"),
        ({"formula": "base", "terms": {"w": 0.8}}, ValueError, "the fader w is not in 'base'"),
        ({"formula": "base + tune"}, ValueError, "unknown name 'tune'"),
        (
            {"formula": "base", "assistant_model": BASE},
            NotImplementedError,
            "assistant_model is not supported with a blend; draft=",
        ),
        ({"formula": "base", "synced_gpus": True}, NotImplementedError, "synced_gpus is not"),
        ({"formula": "base", "num_beams": 2}, NotImplementedError, "num_beams=2"),
        ({"formula": "base", "bland": 2}, ValueError, "bland"),
    ],
)
def test_refusals(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        run(BASE, **arguments)


def test_the_package_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crossfade", None)
    with pytest.raises(ImportError, match="crossfade"):
        run(BASE, formula="base")
