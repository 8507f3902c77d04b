"""Self-judged training: the policy's own responses, as sampled, in the order of a judge."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import crossfade as cf
import datasets
import peft
import pytest
import tiny_models as tiny
import torch
import trl
from crossfade.training import DPOTrainer, SelfJudgeConfig, SelfJudgeTrainer
from trained_models import make, texts
from trainer_runs import LORA, OLD_NAMES

pytestmark = OLD_NAMES
PROMPTS = [{"prompt": f"the film w{i} was"} for i in range(8)]
NEW = 6
Prefers = Callable[[str, str], float]


def by_text(first: str, second: str) -> float:
    """Any strict order of texts that a model cannot know."""
    return 0.5 if first == second else 0.8 if first > second else 0.2


class Judge:
    """Prefers by a function of two texts, and keeps what it was asked."""

    def __init__(self, prefers: Prefers = by_text) -> None:
        self.prefers = prefers
        self.asked: list[tuple[Any, str, str]] = []

    def prefer(self, contexts: list[Any], firsts: list[str], seconds: list[str]) -> Any:
        asked = list(zip(contexts, firsts, seconds, strict=True))
        self.asked += asked
        return torch.tensor([self.prefers(a, b) for _, a, b in asked], dtype=torch.float64)


def arguments(folder: Path, kind: Any = SelfJudgeConfig, **options: Any) -> Any:
    defaults = {
        **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4},
        **{"logging_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0, "report_to": "none"},
        **{"save_strategy": "no", "bf16": False, "use_cpu": True, "disable_tqdm": True},
        "gradient_checkpointing": False,
        **({"max_new_tokens": NEW} if kind is SelfJudgeConfig else {}),
    }
    return kind(**{**defaults, **options})


def trainer(
    folder: Path,
    judge: Any = None,
    *,
    prompts: list[dict[str, Any]] = PROMPTS,
    model: Any = None,
    lora: dict[str, Any] | None = LORA,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    return SelfJudgeTrainer(
        make() if model is None else model,
        args=arguments(folder, **options),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tiny.make_tokenizer(),
        peft_config=None if lora is None else peft.LoraConfig(**lora),
        judge=Judge() if judge is None else judge,
        **(given or {}),
    )


@contextmanager
def watched(made: Any) -> Iterator[list[dict[str, Any]]]:
    """The rows of pairs that a trainer trains on, in order, with their weights and prompts."""
    seen: list[dict[str, Any]] = []
    pairs = made._pairs

    def recorded(prompts: Any, counted: Any) -> Any:
        found = pairs(prompts, counted)
        seen.extend(p.row | {"weight": p.weight, **r} for p, r in zip(found, prompts, strict=True))
        return found

    made._pairs = recorded
    yield seen


def weights_of(made: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}


def train(made: Any, **options: Any) -> list[dict[str, Any]]:
    with watched(made) as seen:
        made.train(**options)
    return seen


def figures(made: Any) -> list[dict[str, float]]:
    return [x for x in made.state.log_history if "loss" in x]


def test_pairs_are_what_the_policy_samples_in_the_order_of_the_judge(tmp_path: Path) -> None:
    """They are the sampled ids: not decoded and encoded anew, without EOS where they were cut."""
    judge = Judge()
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "max_new_tokens": 24}
    model = make()
    with torch.no_grad():  # else few responses would end
        model.lm_head.weight[tiny.EOS] = model.lm_head.weight[26]
    made = trainer(tmp_path, judge, model=copy.deepcopy(model), **options)
    seeds = {i: made._noise(i) for i in range(8)}  # those of the first step
    tokenizer = tiny.make_tokenizer()
    policy = cf.Model(model, tokenizer=tokenizer)
    finished, decoded = set(), set()
    for row in train(made):
        out = cf.generate(
            *(policy, row["prompt"]),
            do_sample=True,
            top_p=0.9,
            max_new_tokens=24,
            num_return_sequences=2,
            seed=[seeds[row["prompt_index"]]],
        )
        assert out.text is not None
        assert not all(out.text) or (row["prompt"], *out.text) in judge.asked
        better = out.text.index(max(out.text))
        assert row["chosen_ids"] == out.responses[better]
        assert row["rejected_ids"] == out.responses[1 - better]
        for text, ids, ended in zip(out.text, out.responses, out.finished.tolist(), strict=True):
            assert (ids[-1] == tiny.EOS) == ended
            finished.add(ended)
            decoded.add(tokenizer(text, add_special_tokens=False)["input_ids"] == ids)
    assert finished == {True, False}
    assert False in decoded  # texts do not lead back to what was sampled


def test_a_step_is_that_of_the_dpo_trainer_on_the_same_pairs(tmp_path: Path) -> None:
    options = {"max_steps": 1, "per_device_train_batch_size": 8}
    given = {"loss": "ipo", "loss_options": {"beta": 0.2}}
    made = trainer(tmp_path / "a", given=given, **options)
    seen = train(made)
    assert all(row["weight"] == 1 for row in seen)
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{k: row[k] for k in keys} for row in sorted(seen, key=lambda r: r["prompt_index"])]
    plain = DPOTrainer(
        make(),
        args=arguments(tmp_path / "b", trl.DPOConfig, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.make_tokenizer(),
        peft_config=peft.LoraConfig(**LORA),
        **given,
    )
    plain.train()
    (mine,), (its,) = figures(made), figures(plain)
    assert {k: mine[k] for k in its} == its
    after = weights_of(plain)
    for name, x in weights_of(made).items():
        assert torch.equal(x, after[name]), name


def test_noise_depends_on_seed_step_and_the_prompts_place_alone(tmp_path: Path) -> None:
    """Batches, and how often gradients are accumulated, change no sample of the first step."""

    def sampled(name: str, **options: Any) -> dict[int, Any]:
        made = trainer(tmp_path / name, **{"learning_rate": 0.0, "max_steps": 4, **options})
        found: dict[int, list[Any]] = {}
        for row in train(made):
            found.setdefault(row["prompt_index"], []).append(
                [row["chosen_ids"], row["rejected_ids"]]
            )
        return found

    one = sampled("a", per_device_train_batch_size=8)
    two = sampled("b", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert one == two
    for each in one.values():  # each of four epochs has noise of its own
        assert len(each) == 4
        assert all(x != y for i, x in enumerate(each) for y in each[:i])
    assert len({str(x) for each in one.values() for x in each}) == 32
    assert sampled("c", per_device_train_batch_size=8, seed=1) != one


def test_ties_and_equal_and_failed_pairs_give_no_gradient(tmp_path: Path) -> None:
    """They are counted. The others count as much as if all did."""

    def some(first: str, second: str) -> float:
        key = len(first + second) % 3
        return [float("nan"), 0.5, by_text(first, second)][key]

    options = {"max_steps": 1, "per_device_train_batch_size": 8}
    made = trainer(tmp_path / "a", Judge(some), **options)
    seen = train(made)
    weights = [row["weight"] for row in seen]
    assert 0 < sum(weights) < 8
    (told,) = figures(made)
    assert told["loss"] == pytest.approx(sum(weights) / 8 * 0.6931472)
    assert told["judge/ties"] + told["judge/failed"] == pytest.approx(1 - sum(weights) / 8)
    assert told["judge/ties"] > 0
    assert told["judge/failed"] > 0
    assert told["judge/chosen"] == pytest.approx(0.8)

    before = weights_of(trainer(tmp_path / "c"))
    made = trainer(tmp_path / "b", Judge(lambda a, b: 0.5), **options)
    train(made)
    (told,) = figures(made)
    assert (told["loss"], told["judge/ties"]) == (0, 1)
    assert "judge/chosen" not in told
    assert "rewards/margins" not in told
    for name, x in weights_of(made).items():
        assert torch.equal(x, before[name])


def test_equal_responses_are_not_judged(tmp_path: Path) -> None:
    judge = Judge()
    made = trainer(tmp_path, judge, max_steps=1, temperature=1e-3)
    assert {row["weight"] for row in train(made)} == {0.0}
    assert judge.asked == []
    assert figures(made)[0]["judge/ties"] == 1


def test_a_response_without_a_word_loses_unasked(tmp_path: Path) -> None:
    """Else a policy that writes nothing would never learn that this is worse."""
    judge, model = Judge(), make()
    with torch.no_grad():  # some responses end at once
        model.lm_head.weight[tiny.EOS] = 2.5 * model.lm_head.weight[26]
    options = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 0.0}
    made = trainer(tmp_path, judge, model=model, **options)
    tokenizer = tiny.make_tokenizer()
    empty = neither = 0
    for row in train(made):
        chosen, rejected = (
            tokenizer.decode(row[key], skip_special_tokens=True).strip()
            for key in ("chosen_ids", "rejected_ids")
        )
        if bool(chosen) != bool(rejected):
            empty += 1
            assert chosen
            assert row["weight"] == 1.0
        elif not chosen:
            neither += 1
            assert row["weight"] == 0.0
    assert empty > 2
    assert neither > 0
    failed = sum(told["judge/failed"] for told in figures(made))
    assert failed * 8 == pytest.approx(neither), "as in a tournament"
    assert all(text for asked in judge.asked for text in asked[1:])


def test_a_prompt_that_fills_the_context_fails_alone(tmp_path: Path) -> None:
    long = {"prompt": "film " * 600}
    made = trainer(tmp_path, prompts=[*PROMPTS[:3], long], max_steps=1, max_length=None)
    with pytest.warns(RuntimeWarning, match="context"):
        seen = train(made)
    assert [bool(row["weight"]) for row in seen] == [row["prompt_index"] != 3 for row in seen]
    assert figures(made)[0]["judge/failed"] == 0.25


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_resumed_run_ends_in_the_same_weights_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    """With dropout, accumulated gradients and an epoch's end on the way."""
    options: dict[str, Any] = {
        **{"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2},
        **{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 0.5},
    }
    if kind == "full":
        options |= {"lora": None, "learning_rate": 1e-3, "given": {"ref_model": make().eval()}}
    else:
        options["lora"] = LORA | {"lora_dropout": 0.3}
    whole = trainer(tmp_path / "a", prompts=PROMPTS * 2, **options)
    seen = train(whole)
    torch.manual_seed(1234)  # a new process has noise of its own
    resumed = trainer(tmp_path / "b", prompts=PROMPTS * 2, **options)
    rest = train(resumed, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert rest == seen[-len(rest) :]
    assert len(rest) == 12
    after = weights_of(resumed)
    for name, x in weights_of(whole).items():
        assert torch.equal(x, after[name]), name
    mine, its = figures(whole)[-1], figures(resumed)[-1]
    # TRL counts tokens since the start of a process
    assert mine | {"num_tokens": 0} == its | {"num_tokens": 0}


def test_sampling_and_training_leave_each_other_alone(tmp_path: Path) -> None:
    """Dropout, checkpointed activations, caches, and what a saved config says of sampling."""
    plain = train(trainer(tmp_path / "a", max_steps=1))
    model = make()
    model.generation_config.update(
        top_k=1, repetition_penalty=3.0, temperature=0.1, use_cache=False
    )
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(
        torch.nn.Dropout(0.9), model.model.layers[0].mlp.act_fn
    )
    saved = copy.deepcopy(model.generation_config)
    modes = []

    class Watching(Judge):
        def prefer(self, *args: Any) -> Any:
            modes.append({m.training for m in made.model.modules()})
            assert not torch.is_grad_enabled()
            return super().prefer(*args)

    made = trainer(
        *(tmp_path / "b", Watching()),
        model=model,
        lora=LORA | {"lora_dropout": 0.9},
        max_steps=1,
        gradient_checkpointing=True,
    )
    assert train(made) == plain
    assert modes == [{False}]
    assert all(m.training for m in made.model.modules())
    assert made.model.config.use_cache
    assert model.generation_config.to_dict() == saved.to_dict() | {"pad_token_id": 0}


def test_ids_and_chats_and_texts_are_read_as_they_are(tmp_path: Path) -> None:
    """The judge reads prompts as they were given; a policy reads the ids that are beside them."""
    turns = [
        {"role": "assistant", "content": "great", "name": "a"},
        {"role": "user", "content": "w"},
    ]
    chats = [[{"role": "user", "content": f"the film w{i}"}, *turns * (i % 2)] for i in range(4)]
    tokenizer = tiny.make_tokenizer()
    judge = Judge()
    seen = train(
        trainer(tmp_path / "a", judge, prompts=[{"prompt": c} for c in chats], max_steps=1)
    )
    for row in seen:
        chat = chats[row["prompt_index"]]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert row["prompt_ids"] == ids
    assert all(context in chats for context, *_ in judge.asked)

    ids = [[5, 6, 7 + i] for i in range(4)]
    judge = Judge()
    seen = train(
        trainer(tmp_path / "b", judge, prompts=[{"prompt_ids": x} for x in ids], max_steps=1)
    )
    assert [row["prompt_ids"] for row in seen] == [ids[row["prompt_index"]] for row in seen]
    assert {context for context, *_ in judge.asked} == {tokenizer.decode(x) for x in ids}
    both = [{"prompt": "other", "prompt_ids": x} for x in ids]
    judge = Judge()
    assert [
        {k: x for k, x in row.items() if k != "prompt"}
        for row in train(trainer(tmp_path / "c", judge, prompts=both, max_steps=1))
    ] == seen
    assert {context for context, *_ in judge.asked} == {"other"}


def test_long_prompts_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt keeps its place in the dataset, and so its noise."""
    long = {"prompt": "the film" + " very" * 9}
    before = [long, *PROMPTS]
    with caplog.at_level(logging.WARNING):
        made = trainer(tmp_path, prompts=before, max_length=12)
    assert made.train_dataset["prompt_index"] == list(range(1, 9))
    assert caplog.messages == [
        "the train dataset: 1 of 9 prompts are left out, as they are longer than 6 tokens, which "
        "args.max_length (12) less args.max_new_tokens (6) leaves"
    ]
    with pytest.raises(
        ValueError, match="the train dataset has no row left: all prompts are longer"
    ):
        trainer(tmp_path, prompts=[long], max_length=12)


def test_evaluation_on_pairs(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(texts("dpo", 6))
    made = trainer(
        tmp_path, given={"eval_dataset": data}, eval_strategy="steps", eval_steps=1, max_steps=1
    )
    train(made)
    (told,) = (x for x in made.state.log_history if "eval_loss" in x)
    assert {"eval_rewards/margins", "eval_loss"} <= told.keys()
    assert "eval_judge/ties" not in told
    assert made.evaluate(data)["eval_loss"] == told["eval_loss"]


def test_the_reference_and_the_judge_are_the_model_without_its_new_adapter(tmp_path: Path) -> None:
    """A judge over the trained model with ``adapter=None`` says the same before and after."""
    model, tokenizer = make(), tiny.make_tokenizer()
    frozen = cf.Model(model, tokenizer=tokenizer, adapter=None)

    class OfModel:
        def prefer(self, contexts: list[str], firsts: list[str], seconds: list[str]) -> Any:
            a, b = (cf.score(frozen, contexts, x).totals for x in (firsts, seconds))
            return torch.sigmoid(a - b)

    asked = ["the film was"], [" great"], [" dull plot"]
    before = OfModel().prefer(*asked)
    made = trainer(tmp_path, OfModel(), model=model, learning_rate=0.1)
    train(made)
    policy = cf.Model(made.model, tokenizer=tokenizer)
    assert cf.score(policy, *asked[:2]).totals != cf.score(frozen, *asked[:2]).totals
    torch.testing.assert_close(OfModel().prefer(*asked), before)
