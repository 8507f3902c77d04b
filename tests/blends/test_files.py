"""Blends as files: what is saved is loaded with its models, and decodes to the same tokens."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import models, training
from crossfade.extras import old_names
from tiny_models import lora, make, make_tokenizer, spread
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

GENERATION: dict[str, Any] = {"do_sample": True, "seed": 3, "max_new_tokens": 8}
TEXTS = ["the film was", "a very dull plot"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and their tokenizer, an adapter and a value head for one of them."""
    pytest.importorskip("peft")
    home = tmp_path_factory.mktemp("made")
    for name, seed in (("base", 0), ("tuned", 1)):
        make("llama", seed).save_pretrained(home / name)
        make_tokenizer().save_pretrained(home / name)
    value = training.value_model(make("llama", 0), rank=2)
    spread(value.lm_head)
    training.save_value_head(value, home / "head")
    with old_names():
        lora(5, make("llama", 0), "default").save_pretrained(home / "kind")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy of the folder, which a test may change and move."""
    return shutil.copytree(made, tmp_path / "home")


def of_all_kinds(home: Path) -> cf.Blend:
    base, tokenizer = models.load(home / "base")
    value = training.load_value_head(home / "head", base)
    both = models.with_adapters(base, {"kind": home / "kind"})
    plain = cf.Model(both, adapter=None, tokenizer=tokenizer, name="plain")
    kind = cf.Model(both, adapter="kind", tokenizer=tokenizer)
    strict = cf.Model(both, adapter=None, tokenizer=tokenizer, system="great", name="strict")
    tuned = cf.Model(*models.load(home / "tuned")[:1], prompt="a bright cast", name="tuned")
    tuned = cf.Model(tuned.model, tokenizer=tokenizer, prompt=tuned.prompt, name="tuned")
    blend = plain + 0.8 * (kind - plain) + torch.tensor([0.5, 0.1]) * tuned - 0.2 * strict
    return blend.within(cf.Support(top_k=9)) + 0.5 * cf.ValueHead(value, name="q")


def written(blend: cf.Blend) -> list[list[int]]:
    return cf.generate(blend, TEXTS, **GENERATION).responses


def test_unions_and_clamps(home: Path) -> None:
    plain, kind = of_all_kinds(home).terms[:2]
    for blend in (
        cf.union(plain, kind),
        plain - 0.5 * cf.intersection(kind, plain) + ([0.5, 1.0] * kind).clamp(min=-3),
    ):
        blend.save(home / "blend.json")
        json.loads((home / "blend.json").read_text(), parse_constant=pytest.fail)  # no Infinity
        loaded = cf.Blend.load(home / "blend.json")
        assert str(loaded) == str(blend)
        assert written(loaded) == written(blend)


def test_the_same_tokens(home: Path) -> None:
    blend = of_all_kinds(home)
    blend.save(home / "blend.json")
    loaded = cf.Blend.load(home / "blend.json")
    assert loaded.to_dict() == blend.to_dict()
    assert written(loaded) == written(blend)
    assert [c.names for c in loaded.models] == [c.names for c in blend.models]
    loaded.save(home / "again.json")
    assert (home / "again.json").read_text() == (home / "blend.json").read_text()


def test_folders_beside_the_file_move_with_it(home: Path) -> None:
    blend = of_all_kinds(home)
    blend.save(home / "blend.json")
    entry = json.loads((home / "blend.json").read_text())["models"]["plain"]
    assert entry["source"] == {"folder": "base"}
    assert entry["adapters"] == {"kind": {"folder": "kind"}}
    moved = home.rename(home.with_name("moved"))
    assert written(cf.Blend.load(moved / "blend.json")) == written(blend)
    (moved / "files").mkdir()
    cf.Blend.load(moved / "blend.json").save(moved / "files" / "blend.json")
    entry = json.loads((moved / "files" / "blend.json").read_text())["models"]["plain"]
    assert entry["source"] == {"folder": str(moved / "base")}
    assert written(cf.Blend.load(moved / "files" / "blend.json")) == written(blend)


def test_transformers_own_models_and_tokenizers(home: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(home / "tuned", padding_side="left")
    blend = cf.Model(model.eval(), tokenizer=tokenizer).within(None)
    blend.save(home / "blend.json")
    term = json.loads((home / "blend.json").read_text())["terms"][0]
    assert term["tokenizer"] == {"folder": "tuned"}
    loaded = cf.Blend.load(home / "blend.json")
    assert loaded.terms[0].model.dtype is torch.bfloat16
    assert loaded.terms[0].tokenizer.name_or_path == str(home / "tuned")
    assert cf.Blend.load(home / "blend.json", dtype=torch.float32).terms[0].model.dtype is (
        torch.float32
    )


def test_ids_of_the_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in the hub's cache is named by its id and revision, and asked for by both."""
    commit = "0123456789" * 4
    cache = home / "models--owner--name" / "snapshots" / commit
    shutil.copytree(home / "base", cache)
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    blend = cf.Model(*models.load(cache)[:1], name="a").within(None)
    blend.save(home / "blend.json")
    source = json.loads((home / "blend.json").read_text())["models"]["a"]["source"]
    assert source == {"hub": "owner/name", "revision": commit}
    cf.Blend.load(home / "blend.json")
    assert asked == [("owner/name", commit)] * 2  # The first looks into the cache alone.
    model = make("llama", 0)
    model.config.name_or_path, model.config._commit_hash = "owner/name", commit
    cf.Model(model, name="a").within(None).save(home / "of_transformers.json")
    assert (home / "of_transformers.json").read_text() == (home / "blend.json").read_text()


@pytest.mark.model
def test_the_small_model_and_its_guides(tmp_path: Path, smollm2_folder: Path) -> None:
    """They are named by their names, and not by where this machine has them."""
    base, tokenizer = models.smollm2()
    both = models.with_adapters(base, {"kind": models.guide("sentiment")})
    plain = cf.Model(both, adapter=None, tokenizer=tokenizer, name="plain")
    blend = plain + 0.8 * (cf.Model(both, adapter="kind", tokenizer=tokenizer) - plain)
    blend.save(tmp_path / "blend.json")
    text = (tmp_path / "blend.json").read_text()
    assert json.loads(text)["models"]["plain"]["source"] == {"model": "smollm2"}
    assert json.loads(text)["models"]["plain"]["adapters"] == {"kind": {"guide": "sentiment"}}
    short = {**GENERATION, "max_new_tokens": 3, "engine": cf.Engine(simple=True)}
    again = cf.generate(cf.Blend.load(tmp_path / "blend.json"), "The film was", **short)
    assert again.text == cf.generate(blend, "The film was", **short).text


def test_an_active_adapter_is_saved_by_its_name(home: Path) -> None:
    base = models.load(home / "base")[0]
    both = models.with_adapters(base, {"kind": home / "kind", "other": home / "kind"})
    blend = cf.Model(both, name="a").within(None)
    blend.save(home / "blend.json")
    (term,) = cf.Blend.load(home / "blend.json").terms
    assert term.adapter == "kind"
    with both.disable_adapter():
        blend.save(home / "blend.json")
    assert cf.Blend.load(home / "blend.json").terms[0].adapter is None
    both.base_model.set_adapter(["kind", "other"])
    with pytest.raises(ValueError, match=r"a has the adapters \['kind', 'other'\] active"):
        blend.save(home / "blend.json")


class TestSourcesOfTheCaller:
    def test_a_model_without_a_source(self, home: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(home / "base")
        base = cf.Model(make("llama", 0), tokenizer=tokenizer, name="base")
        blend = base + cf.Model(make("llama", 1), name="tuned")
        file = home / "blend.json"
        with pytest.raises(ValueError, match="the model of base has no known source; save it with"):
            blend.save(file)
        with pytest.raises(ValueError, match=r"sources has 'bass'.*did you mean 'base'"):
            blend.save(file, sources={"base": None, "tuned": None, "bass": None})
        blend.save(file, sources={"base": home / "base", "tuned": None})
        with pytest.raises(ValueError, match=r"names no source of the model 'tuned', a Llama"):
            cf.Blend.load(file)
        with pytest.raises(ValueError, match=r"models has 'tune'.*did you mean 'tuned'"):
            cf.Blend.load(file, models={"tune": blend.terms[1].model})
        loaded = cf.Blend.load(file, models={"tuned": blend.terms[1].model})
        assert loaded.terms[1].model is blend.terms[1].model
        assert written(loaded) == written(blend)

    def test_a_tokenizer_that_comes_with_its_model(self, home: Path) -> None:
        blend = cf.Model(make("llama", 0), tokenizer=make_tokenizer(), name="a").within(None)
        blend.save(home / "blend.json", sources={"a": None})
        with pytest.raises(ValueError, match=r"models\['a'\] has no tokenizer"):
            cf.Blend.load(home / "blend.json", models={"a": blend.terms[0].model})
        loaded = cf.Blend.load(home / "blend.json", models={"a": blend.terms[0]})
        assert loaded.terms == blend.terms

    def test_adapters_and_heads(self, home: Path) -> None:
        both = lora(5, models.load(home / "base")[0], "kind")
        blend = cf.Model(both, adapter="kind", name="a").within(None)
        value = training.value_model(models.load(home / "base")[0], rank=2)
        spread(value.lm_head)
        blend = blend + cf.ValueHead(value, name="q")
        file = home / "blend.json"
        with pytest.raises(ValueError, match=r"adapter kind of a has no .*\{'a@kind': FOLDER\}"):
            blend.save(file)
        with pytest.raises(ValueError, match=r"head q has no .* save_value_head.*'q': FOLDER"):
            blend.save(file, sources={"a@kind": home / "kind"})
        blend.save(file, sources={"a@kind": home / "kind", "q": home / "head"})
        assert written(self.with_tokenizer(cf.Blend.load(file))) == written(
            self.with_tokenizer(blend)
        )
        training.save_value_head(value, home / "head2")
        blend.save(file, sources={"a@kind": home / "kind"})
        assert json.loads(file.read_text())["values"][0]["head"] == {"folder": "head2"}
        blend.save(file, sources={"a@kind": home / "kind", "q": None})
        assert cf.Blend.load(file, models={"q": value}).values[0].model is value

    @staticmethod
    def with_tokenizer(blend: cf.Blend) -> cf.Blend:
        return cf.Model(blend.terms[0].model, adapter="kind", tokenizer=make_tokenizer()) + (
            blend.value_weights[0] * blend.values[0]
        )


class TestWeightsThatHaveChanged:
    """A file names sources, so that what is there must be what the blend has."""

    @pytest.mark.parametrize("what", ["model", "adapter", "head"])
    def test_they_are_refused(self, what: str, home: Path) -> None:
        blend = of_all_kinds(home)
        model = {"model": 3, "adapter": 1}
        changed = blend.values[0].model if what == "head" else blend.terms[model[what] % 3].model
        part = {"model": "embed_tokens", "adapter": "lora_B.kind", "head": "lm_head.b"}[what]
        with torch.no_grad():
            for name, weight in changed.named_parameters():
                if part in name:
                    weight.add_(0.1)
        says = {"model": "the model of plain has another model.embed", "head": "head q has another"}
        with pytest.raises(ValueError, match=says.get(what, "the adapter kind of plain has anoth")):
            blend.save(home / "blend.json")

    def test_code_and_quantized_models_are_not_named(self, home: Path) -> None:
        model = models.load(home / "base")[0]
        model.config.quantization_config = {"bits": 8}
        with pytest.raises(ValueError, match=r"model of a is quantized.*sources=\{'a': None\}"):
            cf.Model(model, name="a").within(None).save(home / "blend.json")
        kind = type("Own", (type(model),), {"__module__": "transformers_modules.own"})
        del model.config.quantization_config
        model.__class__ = kind
        with pytest.raises(ValueError, match=r"model of a runs code.*sources=\{'a': None\}"):
            cf.Model(model, name="a").within(None).save(home / "blend.json")

    def test_another_class_there(self, home: Path) -> None:
        cf.Model(models.load(home / "base")[0], name="a").within(None).save(home / "blend.json")
        make("qwen3").save_pretrained(home / "base")
        with pytest.raises(ValueError, match=r"'a' of .* is a Qwen3For.* be a LlamaForCau"):
            cf.Blend.load(home / "blend.json")
        shutil.rmtree(home / "base")
        with pytest.raises(OSError, match=r"'a' of .*no folder .*; pass models=\{'a': ...\}"):
            cf.Blend.load(home / "blend.json")

    def test_numbers_and_integers_among_the_weights(self, home: Path) -> None:
        """A tensor without dimensions has no rows, and one of integers has no dtype to take."""
        model = models.load(home / "base")[0]
        model.register_buffer("scale", torch.tensor(1.5))
        model.register_buffer("places", torch.arange(3))
        model.save_pretrained(home / "more")
        blend = cf.Model(model, name="a").within(None)
        blend.save(home / "blend.json", sources={"a": home / "more"})
        for name in ("scale", "places"):
            getattr(model, name).add_(1)
            with pytest.raises(ValueError, match=f"model of a has another {name} than"):
                blend.save(home / "blend.json", sources={"a": home / "more"})
            getattr(model, name).sub_(1)


def test_what_could_not_be_read_again_is_not_written(home: Path) -> None:
    """And the file that was there stays."""
    base = models.load(home / "base")[0]
    good, file = cf.Model(base, name="a").within(None), home / "blend.json"
    good.save(file)
    before = file.read_text()
    other = cf.Model(base, name="b", system="be\ud83d")
    with pytest.raises(ValueError, match=r"blend\.json: .* has half of a surrogate pair"):
        (good + other).save(file)
    weights = torch.tensor([1.0, math.nan])
    with pytest.raises(ValueError, match=r"\['terms'\]\[0\]\['weight'\]\[1\] is nan"):
        (weights * good).save(file)
    assert file.read_text() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_other_dtypes(dtype: torch.dtype, home: Path) -> None:
    model = make("llama", 0).to(dtype)
    cf.Model(model, name="a").within(None).save(home / "blend.json", sources={"a": None})
    loaded = cf.Blend.load(home / "blend.json", models={"a": model})
    assert loaded.terms[0].model is model
    if dtype is torch.float64:
        model.save_pretrained(home / "double")
        model = models.saved.load_model(home / "double", dtype)
        cf.Model(model, name="a").within(None).save(home / "blend.json")
        assert cf.Blend.load(home / "blend.json").terms[0].model.dtype is dtype


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"sources": ["a"]}, TypeError, "sources is a list; it must be a mapping"),
        ({"sources": {"a": 3}}, TypeError, r"sources\['a'\] is a int; it must be a path"),
        ({"source": {}}, TypeError, "unknown argument 'source'; did you mean 'sources'"),
        ({"model": {}}, TypeError, "load got an unknown argument 'model'; did you mean 'models'"),
        ({"models": ["a"]}, TypeError, "models is a list; it must be a mapping"),
        ({"dtype": "bf16"}, ValueError, "^dtype is 'bf16'; .*did you mean 'bfloat16'"),
    ],
)
def test_arguments(
    arguments: dict[str, Any], error: type[Exception], match: str, home: Path
) -> None:
    blend, file = cf.Model(models.load(home / "base")[0], name="a").within(None), home / "b.json"
    blend.save(file)
    do = blend.save if "source" in next(iter(arguments)) else cf.Blend.load
    with pytest.raises(error, match=match):
        do(file, **arguments)


def test_functions_are_refused(home: Path) -> None:
    base = models.load(home / "base")[0]
    blend = cf.Model(base, name="a", prompt=lambda text: text[:3]).within(None)
    with pytest.raises(TypeError, match="the prompt of a is a function"):
        blend.save(home / "blend.json")
    assert not (home / "blend.json").exists()


@pytest.fixture(scope="module")
def saved(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("file") / "blend.json"
    of_all_kinds(made).save(file)
    return json.loads(file.read_text())


class TestDamagedFiles:
    @pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "\udcff"])
    def test_no_blend(self, text: str, tmp_path: Path) -> None:
        file = tmp_path / "blend.json"
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"blend\.json"):
            cf.Blend.load(file)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            cf.Blend.load(tmp_path / "blend.json")

    @pytest.mark.parametrize(
        ("path", "junk", "match"),
        [
            (("format",), 2, "has format 2; this version of crossfade reads 1"),
            (("terms", 0, "weigth"), 1, r"\['terms'\]\[0\] has the key 'weigth'.*mean 'weight'"),
            (("terms", 1, "weight"), "1", r"\['terms'\]\[1\]\['weight'\] is '1'"),
            (("terms", 0, "model"), "plane", r"\['model'\] is 'plane'; it must be one of"),
            (("terms", 0, "model"), [], r"\['model'\] is \[\]"),
            (("terms", 1, "adapter"), "gone", r"\['adapter'\] is 'gone'; it must be one of"),
            (("terms", 0, "tokenizer"), "x", r"\['tokenizer'\] is 'x'"),
            (("values", 0, "head"), {"folder": ""}, r"\['head'\] is \{'folder': ''\}"),
            (("values", 0, "head_dtype"), "int8", r"\['head_dtype'\] is 'int8'"),
            (("values",), {}, r"\['values'\] is \{\}; it must be what Blend\.save writes"),
            (("models",), [], r"\['models'\] is \[\]"),
            (("models", "plain", "source"), {"folder": "a", "hub": "b/c"}, "one of the keys"),
            (("models", "plain", "source"), {"hub": "nowhere"}, "must be OWNER/NAME"),
            (("models", "plain", "source"), {"folder": "a", "revision": "b"}, "only 'hub' may"),
            (("models", "plain", "source"), {"model": "gpt2"}, r"\['model'\] is 'gpt2'"),
            (("models", "plain", "source"), {"pickle": "a"}, "one of the keys"),
            (("models", "plain", "dtype"), "int8", r"\['dtype'\] is 'int8'"),
            (("models", "plain", "class"), 3, r"\['class'\] is 3"),
            (("models", "plain", "adapters"), None, r"\['adapters'\] is None"),
            (("models", "plain", "adapters", "kind"), "x", r"\['adapters'\]\['kind'\] is 'x'"),
            (("support", "term"), 9, r"\['support'\]\['term'\] is 9"),
        ],
    )
    def test_the_key_is_named(
        self, path: tuple[Any, ...], junk: Any, match: str, saved: dict[str, Any], tmp_path: Path
    ) -> None:
        whole = json.loads(json.dumps(saved))
        *way, last = path
        place = whole
        for key in way:
            place = place[key]
        place[last] = junk
        file = tmp_path / "blend.json"
        file.write_text(json.dumps(whole))
        with pytest.raises(ValueError, match=match) as error:
            cf.Blend.load(file)
        assert str(file) in str(error.value)
