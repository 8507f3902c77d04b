"""What a trainer does to a model is undone when it ends, and never reaches a copy of the model."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import crossfade as cf
import datasets
import peft
import pytest
import tiny_models as tiny
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from crossfade.training import add_linear_logp, value_model
from crossfade.training.fused_head import class_with_logp, seated
from trained_models import make, texts
from trainer_runs import KINDS, OLD_NAMES, arguments

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
PLAIN = transformers.LlamaForCausalLM

pytestmark = OLD_NAMES


def trainer(kind: str, model: Any, folder: Path, *, args: Any = (), **options: Any) -> Any:
    given = {"max_steps": 2, "per_device_train_batch_size": 2, **dict(args)}
    if kind != "sft" and "peft_config" not in options:
        options.setdefault("ref_model", make())
    return KINDS[kind][0](
        model,
        args=arguments(kind, folder, **given),
        train_dataset=datasets.Dataset.from_list(texts(kind, 6)),
        processing_class=tiny.make_tokenizer(),
        **options,
    )


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def shallow(model: Any) -> Any:
    """A copy in the way that `nn.DataParallel` makes replicas."""
    found = model._replicate_for_data_parallel()
    found.lm_head = copy.deepcopy(model.lm_head)
    return found


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "replica": shallow,
}


def logits_by_weights(model: Any) -> torch.Tensor:
    """The logits of a new model that has the same weights."""
    fresh = make().eval()
    fresh.load_state_dict(model.state_dict())
    return fresh(input_ids=IDS).logits


def check_own(model: Any) -> None:
    """The model has its plain class, and the logits that its weights give."""
    assert type(model) is PLAIN
    assert not {"forward", "_forward_below"} & vars(model).keys()
    check_logits(model)


@torch.no_grad()
def check_logits(model: Any) -> None:
    modes = model.training
    expected = logits_by_weights(model)
    model.eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    told = model.generate(IDS, max_new_tokens=1, do_sample=False, attention_mask=IDS * 0 + 1)
    assert told[:, -1].tolist() == expected[:, -1].argmax(-1).tolist()
    ours = cf.generate(cf.Model(model), IDS.tolist(), max_new_tokens=1, do_sample=False)
    assert ours.sequences[:, -1].tolist() == told[:, -1].tolist()
    model.train(modes)


@torch.no_grad()
def moved(model: Any) -> Any:
    """The model after a change of its head, which changes its logits."""
    model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    return model


@pytest.mark.parametrize(
    ("kind", "how"), [*(("sft", how) for how in COPIES), ("dpo", "deepcopy"), ("kto", "pickle")]
)
def test_copy_of_a_trained_model_is_itself(tmp_path: Path, kind: str, how: str) -> None:
    model = make()
    made = trainer(kind, model, tmp_path)
    check_own(moved(COPIES[how](model)))  # before training
    made.train()
    check_own(model)
    copied = COPIES[how](model)
    check_own(copied)
    check_own(moved(copied))
    check_own(model)
    if kind != "sft":
        check_own(made.ref_model)


def test_log_ratio_of_a_trained_model_to_its_copy(tmp_path: Path) -> None:
    """A copy made before training stays where it was, even one made after the trainer."""
    tuned = make()
    early = copy.deepcopy(tuned)
    made = trainer("sft", tuned, tmp_path)
    late = copy.deepcopy(tuned)
    made.train()
    given = [[5, 6, 7]], [[8, 9]]
    before = cf.score(cf.Model(make().eval()), *given).logprobs
    for ref in (early, late):
        torch.testing.assert_close(cf.score(cf.Model(ref.eval()), *given).logprobs, before)
    after = cf.score(cf.Model(tuned.eval()), *given).logprobs
    assert (after - before).abs().min() > 1e-3


class Look(transformers.TrainerCallback):
    """Calls a function at the end of each step, and counts the calls."""

    def __init__(self, look: Callable[[Any], None]) -> None:
        self.look, self.calls = look, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.calls += 1
        self.look(given["model"])


@pytest.mark.parametrize("kind", KINDS)
def test_during_training(tmp_path: Path, kind: str) -> None:
    """Callbacks that generate get the right logits, and copies that they make are plain models."""

    def look(model: Any) -> None:
        check_logits(model)
        for how in COPIES.values():
            check_logits(moved(how(model)))
        check_own(copy.deepcopy(model))
        check_own(pickled(model))

    seen, model = Look(look), make()
    trainer(kind, model, tmp_path, callbacks=[seen]).train()
    assert seen.calls == 2
    check_own(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_training_that_ends_early(tmp_path: Path, error: type[BaseException]) -> None:
    def look(model: Any) -> None:
        raise error

    model = make()
    made = trainer("dpo", model, tmp_path, callbacks=[Look(look)])
    with pytest.raises(error):
        made.train()
    check_own(model)
    check_own(made.ref_model)


def test_trainer_that_is_not_made(tmp_path: Path) -> None:
    """TRL refuses this pair of options after it has given the model its head, and Transformers has
    switched its caches off."""
    model = make()
    args = {"sync_ref_model": True, "precompute_ref_log_probs": True}
    with pytest.raises(ValueError, match="sync_ref_model"):
        trainer("dpo", model, tmp_path, args=args)
    check_own(model)
    assert model.config.use_cache


def test_trainer_over_a_copy(tmp_path: Path) -> None:
    """The copy is trained as the model would have been, and the model stays as it is."""
    model = make()
    trainer("dpo", model, tmp_path)
    runs = []
    for trained in (copy.deepcopy(model), make()):
        made = trainer("dpo", trained, tmp_path)
        made.train()
        runs.append([x["loss"] for x in made.state.log_history if "loss" in x])
        check_own(trained)
    assert runs[0] == runs[1]
    torch.testing.assert_close(model(input_ids=IDS).logits, make()(input_ids=IDS).logits)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_two_trainers_over_one_model(tmp_path: Path, bf16: bool) -> None:
    """Whether one runs after the other or in the middle of it, each has its own log-probs."""
    args = {"bf16": bf16}
    once = make()
    trainer("sft", once, tmp_path, args=args).train()
    found = []
    for first in (once, copy.deepcopy(once)):
        made = trainer("dpo", first, tmp_path, args={**args, "max_steps": 1})
        made.train()
        found.append(made.state.log_history[0])
    for name in ("loss", "entropy", "logits/chosen", "mean_token_accuracy", "logps/chosen"):
        assert found[0][name] == found[1][name], name

    other: list[Any] = []

    def look(model: Any) -> None:
        other.append(second.evaluate(second.train_dataset))

    model = make()
    second = trainer("dpo", model, tmp_path, args=args)
    trainer("sft", model, tmp_path, callbacks=[Look(look)], args=args).train()
    assert all("eval_mean_token_accuracy" in x for x in other)
    if not bf16:
        check_own(model)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copy_after_autocast(tmp_path: Path, how: str) -> None:
    """After training Accelerator's autocast stays on the model, around the forward it had then."""
    model = make()
    made = trainer("dpo", model, tmp_path, args={"bf16": True})
    made.train()
    for trained in (model, made.ref_model):
        copied = moved(COPIES[how](trained)).eval()
        expected = logits_by_weights(copied)
        torch.testing.assert_close(copied(input_ids=IDS).logits, expected, rtol=0.1, atol=0.5)
        assert (copied(input_ids=IDS).logits - trained(input_ids=IDS).logits).abs().max() > 1
    with pytest.raises(TypeError, match="fused_lm_head is True; it must be left out"):
        model(input_ids=IDS, labels=IDS, fused_lm_head=True)
    made.evaluate(made.train_dataset)
    bare = accelerate.Accelerator(cpu=True).unwrap_model(model, keep_fp32_wrapper=False)
    torch.testing.assert_close(bare.eval()(input_ids=IDS).logits, logits_by_weights(bare))


def test_adapters(tmp_path: Path) -> None:
    """However adapters are merged, unloaded, added and copied, the base below is a plain model."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    seen = Look(lambda model: check_own(copy.deepcopy(model).merge_and_unload()))
    made = trainer("dpo", make(), tmp_path, peft_config=config, callbacks=[seen])
    made.train()
    assert seen.calls == 2
    tuned = made.model.eval()
    assert type(tuned.get_base_model()) is PLAIN
    copied = copy.deepcopy(tuned)
    expected = tuned(input_ids=IDS).logits
    torch.testing.assert_close(copied(input_ids=IDS).logits, expected)
    merged = copied.merge_and_unload()
    check_own(merged)
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    again = peft.get_peft_model(merged, config)
    trainer("sft", again, tmp_path).train()
    base = again.unload()
    check_own(base)
    torch.testing.assert_close(base.eval()(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_value_model_of_a_trained_model(tmp_path: Path) -> None:
    model = make()
    made = trainer("sft", model, tmp_path)
    values = [value_model(model)]
    made.train()
    values.append(value_model(model))
    for value in values:
        torch.nn.init.normal_(value.get_output_embeddings().weight)
        hidden = model.base_model(input_ids=IDS).last_hidden_state
        expected = value.get_output_embeddings()(hidden)
        torch.testing.assert_close(value(input_ids=IDS).logits, expected)


def test_term_made_before_and_after(tmp_path: Path) -> None:
    model = make()
    made = trainer("sft", model, tmp_path)
    before = cf.Model(model)
    made.train()
    model.eval()
    after = cf.Model(model)
    given = [[5, 6, 7]], [[8, 9]]
    assert torch.equal(cf.score(before, *given).logprobs, cf.score(after, *given).logprobs)
    expected = logits_by_weights(model)  # what the weights give now
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)


class Count(ModelHook):
    """A hook of Accelerate's kind, which sets a forward on the module."""

    calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        Count.calls += 1
        return args, kwargs


def test_forward_that_somebody_set(tmp_path: Path) -> None:
    """It is called while the model is trained, and still there afterwards."""
    model = make()
    add_hook_to_module(model, Count())
    own = model.forward
    seen = Look(lambda m: check_logits(moved(copy.deepcopy(m))))
    made = trainer("sft", model, tmp_path, callbacks=[seen])
    assert model.forward is own
    made.train()
    assert seen.calls == 2
    assert model.forward is own
    assert type(model) is PLAIN
    before = Count.calls
    check_logits(moved(copy.deepcopy(model)))
    assert Count.calls > before
    add_linear_logp(model)
    before = Count.calls
    model(input_ids=IDS)
    assert Count.calls == before + 1


def test_checkpoints_name_the_plain_class(tmp_path: Path) -> None:
    model = make()
    trainer("sft", model, tmp_path, args={"save_strategy": "steps", "save_steps": 1}).train()
    config = json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_log_probs_that_stay() -> None:
    """Without a trainer `add_linear_logp` lasts; only copies of the model are without it."""
    model = make()
    with pytest.raises(ValueError, match="outputs has 'logits'"):
        add_linear_logp(model, outputs=("logits",))
    check_own(model)
    add_linear_logp(model)
    assert isinstance(model, PLAIN)
    found = model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs
    add_linear_logp(model, temperature=2.0)  # this call replaces the first one's
    other = model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs
    assert not torch.allclose(found, other)
    with seated(model, class_with_logp(model)):
        again = model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs
        assert torch.equal(again, found)
    again = model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs
    assert torch.equal(again, other)
    check_own(copy.deepcopy(model))
    check_own(pickled(model))
