"""``crossfade train clp``: from a file to a policy that follows weights, and what it refuses."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import tiny_models as tiny
import torch
import yaml
from crossfade.training import CLPTrainer
from test_clp import arguments, great, policy_of, short, trainer
from train_command import train
from trained_models import make
from trainer_runs import OLD_NAMES

pytestmark = OLD_NAMES
MODULE = """
def great(prompts, responses):
    return [float("great" in text) for text in responses]

def short(prompts, responses):
    return [-len(text.split()) / 6 for text in responses]

def nan(prompts, responses):
    return [float("nan")] * len(responses)
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "clp_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    make().save_pretrained(tmp_path / "base")
    tiny.make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def settings(base: str, folder: Path, **more: Any) -> dict[str, Any]:
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"the film w{i}"}) + "\n" for i in range(6)))
    return {
        "model": base,
        "data": str(data),
        "rewards": {"great": "clp_rewards:great", "short": "clp_rewards:short"},
        "lora": {"r": 2},
        "arguments": {
            **{"output_dir": str(folder / "out"), "max_steps": 4, "save_steps": 2},
            **{"per_device_train_batch_size": 2, "max_new_tokens": 5, "num_generations": 2},
            **{"learning_rate": 1e-2, "kl": [0.0, 0.5]},
        },
        **more,
    }


def test_a_policy_is_trained_saved_and_resumed(base: str, tmp_path: Path) -> None:
    given = settings(base, tmp_path, scope="attention", shared={"r": 2})
    assert train("clp", tmp_path, given, "--json") == 0
    out = tmp_path / "out"
    whole = {f: (out / f / "adapter_model.safetensors").read_bytes() for f in ("great", "shared")}
    (out / "great" / "adapter_model.safetensors").write_bytes(b"")
    last = out / "checkpoint-4" / "short" / "adapter_model.safetensors"
    last.write_bytes(last.read_bytes()[:20])  # as a run leaves it that was killed
    assert train("clp", tmp_path, given, "--resume") == 0
    for name, weights in whole.items():
        assert (out / name / "adapter_model.safetensors").read_bytes() == weights
    model, tokenizer = cf.models.load(base)
    policy = cf.ConditionedPolicy.load(out, model, tokenizer=tokenizer)
    assert policy.rewards == ("great", "short")
    assert policy.shared == "scaled"
    mix = {"great": torch.tensor([0.0, 1.0]), "short": torch.tensor([1.0, 0.0])}
    assert len(cf.generate(policy.at(mix), ["the film", "a"], max_new_tokens=4).text) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rewards": None}, "rewards is None; it must be a mapping of names"),
        ({"rewards": {"great": "clp_rewards:grate"}}, "did you mean 'great'?"),
        (
            {"rewards": {"a b": "clp_rewards:great"}},
            "the name of a reward must be of letters, digits",
        ),
        ({"lora": None}, "lora is missing; a conditioned policy has an adapter for each reward"),
        ({"scope": "heads"}, "scope is 'heads'; it must be one of"),
        ({"shared": {"r": 2}}, "shared names no target_modules"),
        ({"shared": 3}, "shared is 3; it must be a mapping, as lora is"),
        ({"lora": {"r": 2, "use_dora": True}}, "lora has use_dora=True"),
        ({"lora": {"target_modules": ["q_pro"]}}, "did you mean 'q_proj'?"),
        ({"concentration": 2}, "did you mean arguments.concentration?"),
    ],
)
def test_mistakes(base: str, tmp_path: Path, change: Any, says: str, capsys: Any) -> None:
    assert train("clp", tmp_path, {**settings(base, tmp_path), **change}) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_generations": 1}, "num_generations is 1; it must be an int of at least 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be an int of at least 1"),
        ({"max_length": 5}, "max_length is 5; it must be an int above max_new_tokens"),
        ({"concentration": 0.0}, "concentration is 0.0; it must be 0.01 at least"),
        ({"concentration": [1.0, -1]}, r"concentration\[1\] is -1; it must be 0.01 at least"),
        ({"concentration": [1.0] * 3}, r"concentration has 3 numbers; it must have 2, one for"),
        ({"kl": 1.5}, r"kl is 1.5; it must be within \[0, 1\]"),
        ({"kl": [0.5, 0.1]}, r"kl is \[0.5, 0.1\]; it must be within"),
        ({"kl": [0.1, 0.2, 0.3]}, "it must be a number or a list of two"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, change: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, **change)


def test_what_the_trainer_refuses(tmp_path: Path) -> None:
    rewards = {"great": great, "short": short}
    with pytest.raises(TypeError, match="policy is a str; it must be a ConditionedPolicy"):
        CLPTrainer("policy", arguments(tmp_path), rewards)
    with pytest.raises(ValueError, match=r"rewards is \['great'\]; it must be a mapping with"):
        trainer(tmp_path, rewards={"great": great})
    with pytest.raises(ValueError, match="train_dataset has no rows"):
        trainer(tmp_path, train_dataset=[])
    with pytest.raises(ValueError, match="no row left: all prompts are longer than 1 tokens"):
        trainer(tmp_path, max_length=7)
    with pytest.raises(ValueError, match="prompt of row 0 of train_dataset is missing"):
        trainer(tmp_path, train_dataset=[{"text": "a"}])
    policy = policy_of()
    policy.tokenizer = None
    with pytest.raises(ValueError, match="processing_class is None, and so is the policy's"):
        trainer(tmp_path, policy)


def test_a_reward_that_is_nan_is_named_with_its_response(base: str, tmp_path: Path, capsys: Any):
    """The run stops there, and goes on from its last checkpoint."""
    given = settings(base, tmp_path)
    given["rewards"]["short"] = "clp_rewards:nan"
    assert train("clp", tmp_path, given) == 2
    said = capsys.readouterr().err
    assert "the reward 'short' is nan at step 1 for the response" in said
    assert "it must be finite" in said


def test_ctrl_c_keeps_what_was_learnt(base: str, tmp_path: Path, monkeypatch: Any) -> None:
    import clp_rewards

    calls = []

    def interrupted(prompts: Any, responses: Any) -> Any:
        calls.append(len(responses))
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return [0.5 * (i % 2) for i in range(len(responses))]

    given = settings(base, tmp_path)
    plain = {**given, "arguments": {**given["arguments"], "output_dir": str(tmp_path / "plain")}}
    with monkeypatch.context() as patched:
        patched.setattr(clp_rewards, "great", interrupted)
        assert train("clp", tmp_path, given) == 130
        assert (tmp_path / "out" / "checkpoint-3").is_dir()
        assert train("clp", tmp_path, given, "--resume") == 0
        assert train("clp", tmp_path, plain) == 0
    for name in ("great", "short"):
        file = Path(name) / "adapter_model.safetensors"
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_help_shows_the_keys(tmp_path: Path, capsys: Any) -> None:
    from crossfade import cli

    with pytest.raises(SystemExit):
        cli.main(["train", "clp", "--help"])
    told = capsys.readouterr().out
    assert yaml.safe_load("rewards: {sentiment: rewards:sentiment}")["rewards"]
    assert "num_generations" in told
    assert "crossfade.ConditionedPolicy.load" in " ".join(told.split())
