"""Saved models are read whole and from the disk alone, and nothing is unpickled or run."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from crossfade import cli, loading, models, training
from crossfade.models.saved_adapters import ADAPTER_CONFIG
from edits import WEIGHTS, edit_json, edit_tensors, in_parts, without, write_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import make

# --- from the disk alone


@pytest.mark.parametrize("name", ["base", "./base", "owner/base", "{home}/base", "~/base"])
def test_a_path_is_read_without_a_question_to_the_network(
    copied: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (copied / "owner").mkdir()
    shutil.copytree(copied / "base", copied / "owner" / "base")
    monkeypatch.setenv("HOME", str(copied))
    monkeypatch.chdir(copied)
    path = name.format(home=copied)
    for guide in ("", "@tuned", "@head", "@./tuned", "@~/tuned"):
        specs, used = [f"a={path}{guide}", f"b={path}"], "b + 0.5 * a"
        loading.Plan.read(specs, used).load()
    head = training.load_value_head("head", models.load(path)[0])
    assert head.value_kind == "q"
    assert asked == []


@pytest.mark.parametrize(
    "name",
    [
        *("/not/here", "./here", "base", "models/base", "~/nobody", "~no-such-user/a", "a/b/c"),
        *("../a/b", "", ".", "owner/", "a\nb", "file", Path("owner/base"), "x" * 300, "a\0b"),
    ],
    ids=repr,
)
def test_what_is_a_path_and_not_there_is_not_looked_for_elsewhere(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises((OSError, ValueError)):
        models.load(name)
    assert asked == []


def test_an_id_on_the_hub_is_downloaded_without_pickles_and_read_from_there(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[Any] = []

    def snapshot_download(hub_id: str, allow_patterns: list[str], **options: Any) -> str:
        wanted.append((hub_id, allow_patterns))
        return str(saved / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    models.load("owner/base")
    ((hub_id, patterns),) = wanted
    assert hub_id == "owner/base"
    assert not any(p.endswith((".bin", ".py", ".pt", ".pth", ".pkl", "*")) for p in patterns)


def test_an_adapter_in_a_models_folder_is_neither_loaded_nor_followed(
    copied: Path, asked: list[Any]
) -> None:
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = models.load(copied / "base")[0](ids).logits
        for file in (copied / "tuned").iterdir():
            shutil.copy(file, copied / "base")
        edit_json(copied / "base" / ADAPTER_CONFIG, base_model_name_or_path="owner/x")
        model = models.load(copied / "base")[0]
        assert torch.equal(model(ids).logits, expected)
    assert model.config.name_or_path == str(copied / "base")
    assert asked == []


# --- neither pickles nor code


@pytest.mark.parametrize(
    "place",
    [
        *("pytorch_model.bin", "../x.safetensors", "sub/x.safetensors", "x.SAFETENSORS", "x.pt"),
        *("..", "x.safetensors.bin", "/etc/x.safetensors", "x\\y.safetensors", "", 3, None, ["a"]),
    ],
    ids=repr,
)
def test_an_index_may_name_safetensors_beside_it_alone(
    copied: Path, trap: bytes, place: Any
) -> None:
    folder = copied / "base"
    places: dict[str, Any] = in_parts(folder)
    models.load(folder)
    places["lm_head.weight"] = place
    (folder / "pytorch_model.bin").write_bytes(trap)
    (folder / "x.SAFETENSORS").write_bytes(trap)
    write_index(folder, places)
    with pytest.raises(ValueError, match="must be a safetensors file beside it"):
        models.load(folder)


def test_pickles_beside_safetensors_are_not_loaded(copied: Path, trap: bytes) -> None:
    for folder in ("base", "tuned", "head"):
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "x.pth"):
            (copied / folder / name).write_bytes(trap)
    base = f"{copied / 'base'}"
    loading.Plan.read(
        [f"a={base}@{copied / 'tuned'}", f"b={base}@{copied / 'head'}"], "a + b"
    ).load()


@pytest.mark.parametrize("where", ["base", "tuned", "head"])
def test_pickles_in_place_of_safetensors_are_refused(copied: Path, trap: bytes, where: str) -> None:
    (file,) = (copied / where).glob("*.safetensors")
    file.write_bytes(trap)
    with pytest.raises(OSError, match="cannot be read"):
        loading.Plan.read(
            [f"a={copied / 'base'}@{copied / where}" if where != "base" else f"{copied / 'base'}"]
            + ([f"c={copied / 'base'}"] if where == "head" else []),
            "c + a" if where == "head" else None,
        ).load()


EVIL = {
    "config.json": {
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        "text_config": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}},
        "custom_pipelines": {"text-generation": {"impl": "evil.P"}},
    },
    "tokenizer_config.json": {
        "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]},
        "tokenizer_class": "T",
    },
    "generation_config.json": {"custom_generate": "evil"},
}


@pytest.mark.parametrize("file", EVIL)
def test_code_in_a_models_folder_is_never_run(
    copied: Path, asked: list[Any], capsys: pytest.CaptureFixture[str], file: str
) -> None:
    folder, mark = copied / "base", copied / "ran"
    code = f"open({str(mark)!r}, 'w').close()\nC = M = T = P = generate = None\n"
    for name in ("evil.py", "generate.py", "custom_generate/generate.py", "__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    edit_json(folder / file, **EVIL[file])
    cli.main(["generate", "a", f"--model={folder}", "--max-new-tokens=1"])
    assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()
    assert asked == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include 'MARK' %}",
        "{% for i in range(10 ** 12) %}a{% endfor %}",
    ],
)
def test_a_chat_template_can_do_nothing_but_write(
    copied: Path, capsys: pytest.CaptureFixture[str], template: str
) -> None:
    mark = copied / "ran"
    (copied / "base" / "chat_template.jinja").write_text(template.replace("MARK", str(mark)))
    assert cli.main(["generate", "a", "--chat", f"--model={copied / 'base'}"]) == 2
    assert "the chat template of model cannot take" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_cannot_ask_for_compiled_code(copied: Path, asked: list[Any], key: str) -> None:
    edit_json(copied / "base" / "config.json", **{key: "owner/kernel"})
    with pytest.raises(ValueError, match="asks for the kernel 'owner/kernel'"):
        models.load(copied / "base")
    assert asked == []


# --- whole


@pytest.mark.parametrize(
    "part", ["layers.1.", "layers.0.self_attn.q_proj", "lm_head", "model.norm", "embed_tokens"]
)
def test_a_model_that_lacks_weights_is_refused_by_their_name(copied: Path, part: str) -> None:
    edit_tensors(copied / "base" / WEIGHTS, without(part))
    with pytest.raises(ValueError, match=rf"is incomplete: it has no weights for \S*{part}"):
        models.load(copied / "base")


def test_tied_weights_are_not_missing(copied: Path) -> None:
    edit_json(copied / "base" / "config.json", tie_word_embeddings=True)
    edit_tensors(copied / "base" / WEIGHTS, without("lm_head"))
    model, _ = models.load(copied / "base")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, r"has no weights for model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"has weights for model\.layers\.1\..* does not have"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0; it must be at least 1"),
        ({"intermediate_size": 8}, r"\[16, 24\]; it must be \[16, 8\], as config.json says"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "must be a causal language model"),
        ({"architectures": "BertForTokenClassification"}, "must be a causal language model"),
        ({"model_type": "bert"}, "has no weights for bert"),
    ],
    ids=repr,
)
def test_a_config_of_another_model_is_refused(copied: Path, changes: Any, says: str) -> None:
    edit_json(copied / "base" / "config.json", **changes)
    with pytest.raises(ValueError, match=says):
        models.load(copied / "base")


def test_a_classifier_is_no_language_model(copied: Path, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    LlamaForSequenceClassification(make().config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="is a LlamaForSequenceClassification; it must be"):
        models.load(tmp_path / "classifier")


@pytest.mark.parametrize("damage", ["no part", "a part's tensor", "the index", "cut", "no map"])
def test_parts_must_all_be_there(copied: Path, damage: str) -> None:
    folder = copied / "base"
    places = in_parts(folder)
    if damage == "no part":
        (folder / "part-1.safetensors").unlink()
    elif damage == "a part's tensor":
        edit_tensors(folder / places["lm_head.weight"], without("lm_head"))
    elif damage == "the index":
        edit_tensors(folder / places["lm_head.weight"], without("lm_head"))
        write_index(folder, {k: v for k, v in places.items() if k != "lm_head.weight"})
    elif damage == "cut":
        data = (folder / "part-1.safetensors").read_bytes()
        (folder / "part-1.safetensors").write_bytes(data[:-9])
    else:
        write_index(folder, {})
    with pytest.raises((OSError, ValueError), match=r"is incomplete|cannot be read|weight_map"):
        models.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '"a"', "\xff"], ids=len)
@pytest.mark.parametrize(
    "file",
    [
        *("base/config.json", "base/generation_config.json", "base/tokenizer.json"),
        *("base/tokenizer_config.json", "tuned/adapter_config.json", "head/value_head.json"),
    ],
)
def test_json_that_is_none_is_an_error_that_names_the_folder(
    copied: Path, file: str, text: str
) -> None:
    (copied / file).write_bytes(text.encode("latin-1"))
    guide = "" if file.startswith("base") else f"@{copied / Path(file).parts[0]}"
    specs = [f"a={copied / 'base'}{guide}", f"b={copied / 'base'}"]
    with pytest.raises((ValueError, OSError), match=Path(file).parts[0]) as error:
        loading.Plan.read(specs, "b + a").load()
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = [
    *(
        "model_type",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "dtype",
    ),
    *("num_hidden_layers", "rope_parameters", "tie_word_embeddings", "architectures", "auto_map"),
    *("eos_token_id", "layer_types", "quantization_config", "attention_dropout", "rms_norm_eps"),
]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=2))
@pytest.mark.filterwarnings("ignore")
def test_whatever_a_config_says_is_right_or_an_error(
    saved: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(saved / "base", folder, dirs_exist_ok=True)
    edit_json(folder / "config.json", **changes)
    with contextlib.suppress(ValueError, OSError, ImportError):
        models.load(folder)
