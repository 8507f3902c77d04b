"""``crossfade train`` over ``BASE@FOLDER``: what is saved decodes as it was trained."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import crossfade as cf
import peft
import pytest
import torch
from crossfade import models
from crossfade.models.joined_adapters import join_adapters
from crossfade.training import chain, load_value_head, run
from safetensors.torch import load_file
from sweeps import product
from test_train_aligner import settings as aligner_settings
from test_train_judge import PAIR
from test_train_judge import settings as judge_settings
from train_command import settings, train
from trained_models import make
from trainer_runs import OLD_NAMES

pytestmark = [
    OLD_NAMES,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]
IDS = torch.tensor([[5, 6, 7, 8, 9]])
FIRST = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "use_rslora": True}
FIRST |= {"alpha_pattern": {"up_proj": 7}, "rank_pattern": {"up_proj": 4}, "layers_to_transform": 0}
SECOND = {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}
VALUE_ROW = {"prompt": "the film", "completion": " great", "reward": 0.8, "finished": True}


def adapter(base: str, folder: Path, **config: Any) -> Path:
    """A random adapter, saved."""
    model, _ = models.load(Path(base))
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(std=0.2)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def first(base: str, tmp_path: Path) -> Path:
    return adapter(base, tmp_path / "first", **FIRST)


def of_kind(kind: str, base: str, folder: Path, **more: Any) -> dict[str, Any]:
    if kind == "metaaligner":
        given = aligner_settings(base, folder, **more)
    elif kind in ("jsft", "self-judge"):
        rows = [PAIR, PAIR] if kind == "jsft" else [{"prompt": "the film"}]
        given = judge_settings(base, folder, rows, **more)
        given["arguments"] |= {"max_new_tokens": 4} if kind == "self-judge" else {}
    else:
        given = settings(base, folder, kind, **more)
        if kind == "value":
            (folder / "value.jsonl").write_text(json.dumps(VALUE_ROW))
            given["arguments"] |= {"learning_rate": 1e-1}
    given["arguments"] |= {"max_steps": 1, "warmup_steps": 0}
    return given


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits of what was trained, as it was when each run was saved."""
    found: list[torch.Tensor] = []
    plain = run._fit

    def seen(*args: Any, **options: Any) -> Any:
        trainer, measured = plain(*args, **options)
        model = getattr(trainer, "value_model", trainer.model).eval()
        with torch.no_grad():
            found.append(model(input_ids=IDS).logits)
        return trainer, measured

    monkeypatch.setattr(run, "_fit", seen)
    return found


@torch.no_grad()
def logits(base: str, folder: Path) -> torch.Tensor:
    model, _ = models.load(Path(base))
    return models.with_adapters(model, {"x": folder})(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "metaaligner"])
def test_an_adapter_over_another_is_saved_with_it(
    base: str, tmp_path: Path, first: Path, kind: str, trained: list[torch.Tensor]
) -> None:
    given = of_kind(kind, f"{base}@{first}", tmp_path, lora=SECOND)
    assert train(kind, tmp_path, given) == 0
    out = tmp_path / "out"
    torch.testing.assert_close(logits(base, out), trained[-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained[-1], logits(base, first), atol=1e-3)
    spec = cf.specs.Spec.read(f"x={base}@{out}")
    assert spec.guide == out


@pytest.mark.parametrize(
    ("lora", "head"),
    product([None, SECOND], [{"kind": "q", "rank": 2}, {"kind": "scalar"}], together=1),
)
def test_a_value_head_over_an_adapter_is_saved_with_it(
    base: str, tmp_path: Path, first: Path, lora: Any, head: Any, trained: list[torch.Tensor]
) -> None:
    given = of_kind("value", f"{base}@{first}", tmp_path, lora=lora, value=head)
    assert train("value", tmp_path, given) == 0
    found = load_value_head(tmp_path / "out")
    with torch.no_grad():
        values = found(input_ids=IDS).logits
    torch.testing.assert_close(values, trained[-1], rtol=1e-5, atol=1e-5)
    assert values.abs().max() > 1e-3


def test_without_lora_the_whole_model_is_saved(
    base: str, tmp_path: Path, first: Path, trained: list[torch.Tensor]
) -> None:
    given = of_kind("sft", f"{base}@{first}", tmp_path, lora=None)
    assert train("sft", tmp_path, given) == 0
    model, _ = models.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, trained[-1])
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_run_that_is_resumed_ends_in_the_same_adapter(
    base: str, tmp_path: Path, first: Path
) -> None:
    given = of_kind("sft", f"{base}@{first}", tmp_path, lora=SECOND)
    given["arguments"] |= {"save_steps": 1, "lr_scheduler_type": "constant"}
    found = {}
    for name, steps in (("whole", [2]), ("cut", [1, 2])):
        given["arguments"]["output_dir"] = str(tmp_path / name)
        for i, most in enumerate(steps):
            given["arguments"]["max_steps"] = most
            assert train("sft", tmp_path, given, *["--resume"] * (i > 0)) == 0
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert found["whole"].keys() == found["cut"].keys()
    assert all(torch.equal(x, found["cut"][key]) for key, x in found["whole"].items())


def test_a_chain_of_three(
    base: str, tmp_path: Path, first: Path, trained: list[torch.Tensor]
) -> None:
    """What was joined is an adapter like any other, over which a third can be trained."""
    over = first
    for kind in ("jsft", "self-judge"):
        folder = tmp_path / kind
        folder.mkdir()
        assert train(kind, folder, of_kind(kind, f"{base}@{over}", folder, lora=SECOND)) == 0
        over = folder / "out"
    torch.testing.assert_close(logits(base, over), trained[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "second",
    [
        SECOND,
        {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
        {
            "target_modules": r".*\.1\..*(q|o)_proj",
            "rank_pattern": {"1.self_attn.q_proj": 5},
        },
        {"target_modules": ["v_proj"], "alpha_pattern": {r"layers\.0.*v_proj": 3}},
    ],
)
def test_a_joined_adapter_adds_what_both_add(
    base: str, tmp_path: Path, first: Path, second: dict[str, Any]
) -> None:
    other = adapter(base, tmp_path / "second", **second)
    join_adapters(first, other, tmp_path / "first")  # a folder of its own, or one of both
    model, _ = models.load(Path(base))
    again = adapter(base, tmp_path / "again", **FIRST)
    merged = models.with_adapters(model, {"x": again}).merge_and_unload()
    with torch.no_grad():
        expected = models.with_adapters(merged, {"x": other})(input_ids=IDS).logits
    torch.testing.assert_close(logits(base, first), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("below", "lora", "message"),
    [
        ({}, {"use_dora": True}, "and lora has use_dora: True"),
        ({}, {"modules_to_save": ["lm_head"]}, "and lora has modules_to_save: ['lm_head']"),
        ({}, {"bias": "lora_only"}, "and lora has bias: 'lora_only'"),
        ({}, {"init_lora_weights": "pissa"}, "and lora has init_lora_weights: 'pissa'"),
        ({}, {"target_modules": ["embed_tokens"]}, "lora_embedding_A, which is not of a linear"),
        ({"use_dora": True}, {}, "which has use_dora: True"),
        ({"modules_to_save": ["lm_head"]}, {}, "which has modules_to_save"),
        ({"target_modules": ["lm_head"]}, {}, "lora_A.weight, of the output embeddings"),
    ],
)
def test_what_cannot_be_joined_is_refused_before_the_training(
    base: str,
    tmp_path: Path,
    below: dict[str, Any],
    lora: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("transformers.Trainer.train", pytest.fail)
    under = adapter(base, tmp_path / "first", **{"target_modules": ["q_proj"], **below})
    given = of_kind("sft", f"{base}@{under}", tmp_path, lora={**SECOND, **lora})
    assert train("sft", tmp_path, given) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Merge the first into the base: " in told


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_tied_embeddings_is_not_merged(
    base: str, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = tmp_path / "tied"
    shutil.copytree(base, tied)
    make("tied").save_pretrained(tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of tied weights
        under = adapter(str(tied), tmp_path / "first", target_modules=[target])
        given = of_kind("sft", f"{tied}@{under}", tmp_path, lora=None)
        assert train("sft", tmp_path, given) == 2
    assert "changes the input or the output embeddings" in capsys.readouterr().err


def test_a_prompt_that_was_tuned_is_not_merged(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = models.load(Path(base))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "first")
    given = of_kind("sft", f"{base}@{tmp_path / 'first'}", tmp_path, lora=None)
    assert train("sft", tmp_path, given) == 2
    assert (
        "whose adapter is of PROMPT_TUNING; it must be of a kind that merges"
        in capsys.readouterr().err
    )


def test_the_merge_that_is_advised(base: str, tmp_path: Path, monkeypatch: Any) -> None:
    under = adapter(base, tmp_path / "first", target_modules=["q_proj"], use_dora=True)
    given = of_kind("sft", f"{base}@{under}", tmp_path)
    own = {k: x for k, x in given.items() if k in ("data", "arguments", "model")}
    s = run.Settings("sft", **own, lora={"r": 2})
    with pytest.raises(ValueError, match="Merge") as caught:
        chain.check(s)
    recipe = str(caught.value).partition("into the base: ")[2].partition(". Then")[0]
    monkeypatch.chdir(tmp_path)
    exec(recipe, {"crossfade": cf})
    model, _ = models.load(Path("merged"))
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, logits(base, under), rtol=1e-5, atol=1e-5)


def test_a_run_that_is_pushed_is_refused(
    base: str, tmp_path: Path, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = of_kind("sft", f"{base}@{first}", tmp_path)
    given["arguments"]["push_to_hub"] = True
    assert train("sft", tmp_path, given) == 2
    assert "arguments.push_to_hub is given, and model is" in capsys.readouterr().err
