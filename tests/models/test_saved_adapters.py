"""An adapter of another model, with an odd config or a lack is an error that names its folder."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crossfade import loading, models, training
from crossfade.extras import old_names
from crossfade.models.saved_adapters import ADAPTER, ADAPTER_CONFIG
from crossfade.models.saved_value_heads import load_into
from edits import edit_json, edit_tensors, without
from tiny_models import make
from transformers import LlamaConfig, LlamaForCausalLM


def test_adapters_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folders is empty"):
        models.with_adapters(torch.nn.Linear(1, 1), {})
    with pytest.raises(FileNotFoundError, match=r"folders\['a'\] is .* adapter_model.safetensors"):
        models.with_adapters(torch.nn.Linear(1, 1), {"a": tmp_path})


@pytest.mark.parametrize(("layers", "says"), [(1, "weights for what is not there"), (3, "no weig")])
def test_adapters_of_other_models(tmp_path: Path, layers: int, says: str) -> None:
    """The other model is as wide, but has more layers or fewer."""
    peft = pytest.importorskip("peft")
    shape = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    two, other = (
        LlamaForCausalLM(LlamaConfig(**shape, **heads, num_hidden_layers=n)) for n in (2, layers)
    )
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of old names and of layers without weights
        peft.get_peft_model(two, config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"folders\['a'\] is .*, which has {says}"):
            models.with_adapters(other, {"a": tmp_path})


@pytest.mark.parametrize("lacks", [ADAPTER, ADAPTER_CONFIG])
def test_an_adapter_that_lacks_a_file_is_not_looked_for_elsewhere(
    copied: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    """It is not looked for on the hub, though its folder has a name as ids there have."""
    monkeypatch.chdir(copied)
    (copied / "owner").mkdir()
    folder = shutil.copytree("tuned", "owner/tuned")
    (Path(folder) / lacks).unlink()
    with pytest.raises(FileNotFoundError, match=ADAPTER):
        models.with_adapters(make(), {"a": folder})
    with pytest.raises(FileNotFoundError, match=ADAPTER):
        loading.Plan.read([f"a=base@{folder}"]).load()
    assert asked == []


def tuned(folder: Path, base: Any) -> Any:
    return models.with_adapters(base, {"a": folder})


def resumed(folder: Path, base: Any) -> Any:
    """A value head that goes on from a checkpoint."""
    model = value_head_with_adapter(base)
    load_into(model, folder)
    return model


def value_head_with_adapter(base: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with old_names():
        return peft.get_peft_model(training.value_model(base), config)


@pytest.mark.parametrize("read", [tuned, training.load_value_head, resumed])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("lacks", "no weights for .*lora_B"),
        ("excess", "weights for what is not there: .*more"),
        ("shape", "must be (of )?an adapter .*size mismatch"),
    ],
)
def test_an_adapters_weights_are_those_of_its_layers(
    copied: Path, read: Callable[[Path, Any], Any], damage: str, says: str
) -> None:
    base, folder = models.load(copied / "base")[0], copied / "tuned"
    if read is not tuned:  # then it reads a value head, which has an adapter
        folder = copied / "trained"
        training.save_value_head(value_head_with_adapter(base), folder)
    file = folder / ADAPTER
    if damage == "lacks":
        edit_tensors(file, without("layers.1.self_attn.q_proj.lora_B"))
    elif damage == "excess":
        edit_tensors(file, lambda tensors: tensors.update({"base_model.more": torch.ones(1)}))
    else:
        edit_tensors(file, lambda tensors: tensors.update({k: t[:1] for k, t in tensors.items()}))
    with pytest.raises(ValueError, match=says):
        read(folder, base)


ODD_ADAPTERS = [
    {"peft_type": "NONE"}, {"peft_type": None}, {"peft_type": 3}, {"peft_type": ["LORA"]},
    {"peft_type": "XLORA", "adapters": {"0": "owner/x"}, "hidden_size": 16},
    {"r": 0}, {"r": -1}, {"r": "two"}, {"r": 4}, {"lora_alpha": "x"}, {"lora_alpha": None},
    {"target_modules": ["nothing"]}, {"target_modules": 3}, {"target_modules": "("},
    {"lora_dropout": 7}, {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [9]},
    {"rank_pattern": {"q_proj": 0}}, {"task_type": "x"},
    {"auto_mapping": {"parent_library": "evil"}}, {"layer_replication": [[0, 9]]},
    {"megatron_config": {"a": 1}, "megatron_core": "evil"},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # PEFT has many warnings
@pytest.mark.parametrize("changes", ODD_ADAPTERS, ids=repr)
def test_an_odd_adapter_config_is_an_error_that_names_the_folder(
    copied: Path, asked: list[Any], changes: dict[str, Any]
) -> None:
    edit_json(copied / "tuned" / ADAPTER_CONFIG, **changes)
    try:
        models.with_adapters(make(), {"a": copied / "tuned"})
    except (ValueError, ImportError) as error:
        assert "tuned" in str(error) or isinstance(error, ImportError)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    assert asked == []
