"""The training of conditioned policies: each row at a mix of its own, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import crossfade as cf
import peft
import pytest
import tiny_models as tiny
import torch
from crossfade import losses
from crossfade.models.adapters import adapter_layers
from crossfade.policies.conditioned import PromptedPolicy
from crossfade.training import CLPConfig, CLPTrainer
from crossfade.training.clp.learner import Learner
from crossfade.training.clp.packing import takes_packed
from crossfade.training.clp.rollouts import Rollouts
from trained_models import make
from trainer_runs import OLD_NAMES
from transformers import BloomConfig, BloomForCausalLM, TrainerCallback

pytestmark = OLD_NAMES
PROMPTS = [{"prompt": f"the film w{i} was"} for i in range(8)]
REWARDS = ("great", "short")
NEW = 6
SCOPES = ("full", "attention", "head")


def great(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """The share of words with an even length, which a policy can raise by which words it writes."""
    each = [[len(word) % 2 == 0 for word in text.split()] or [False] for text in responses]
    return [sum(words) / len(words) for words in each]


def short(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    return [-len(text.split()) / NEW for text in responses]


def policy_of(
    scope: str = "full", *, base: Any = None, shared: bool = False, **options: Any
) -> Any:
    lora = peft.LoraConfig(r=2, lora_alpha=4)
    return cf.ConditionedPolicy.create(
        make().eval() if base is None else base,
        REWARDS,
        lora,
        scope=scope,
        shared=lora if shared else None,
        tokenizer=tiny.make_tokenizer(),
    )


def shaken(policy: Any, seed: int = 1) -> Any:
    """The same policy with deltas that change something."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in policy.model.named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return policy


def arguments(folder: Path, **options: Any) -> CLPConfig:
    defaults = {
        **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4},
        **{"logging_steps": 1, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True},
        **{"save_strategy": "no", "bf16": False, "disable_tqdm": True},
        **{"max_new_tokens": NEW, "num_generations": 3},
    }
    return CLPConfig(**{**defaults, **options})


def trainer(folder: Path, policy: Any = None, rewards: Any = None, **options: Any) -> CLPTrainer:
    own = ("eval_dataset", "train_dataset", "processing_class")
    given = {k: options.pop(k) for k in own if k in options}
    return CLPTrainer(
        policy_of() if policy is None else policy,
        arguments(folder, **options),
        {"great": great, "short": short} if rewards is None else rewards,
        **{"train_dataset": PROMPTS, **given},
    )


def weights_of(policy: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in policy.model.named_parameters() if "lora_" in n}


def figures(made: Any) -> list[dict[str, float]]:
    return [x for x in made.state.log_history if "loss" in x]


# ---- log-probs


def batch_of(policy: Any, mixes: torch.Tensor) -> Rollouts:
    """Two responses of different lengths to each of some prompts, one of them empty."""
    prompts = [[5, 6, 7], [8, 9], [6], [9, 5, 8, 7]][: len(mixes)]
    responses = [[10, 11], [12], [13, 14, 15], [], [16], [17, 18], [19, 20], [21]][: 2 * len(mixes)]
    ones = torch.zeros(len(responses), 1)
    return Rollouts(
        prompts, prompts, responses, mixes, ones[::2, 0], ones[::2], ones, ones[:, 0] > 0
    )


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("kind", ["llama", "tied", "softcap"])
@pytest.mark.parametrize("scope", SCOPES)
def test_log_probs_of_each_row_are_those_at_its_own_mix(
    scope: str, kind: str, shares: bool
) -> None:
    """They are those that scoring finds under the merged model, in rows of any number."""
    policy = shaken(policy_of(scope, base=make(kind).eval()))
    weights = {"great": torch.tensor([0.5, 0.0, 1.0, 0.3])}
    weights["short"] = 1 - weights["great"]
    kl = torch.tensor([0.0, 0.5, 0.2, 1.0])
    mix = policy.mix(weights, kl)
    mixes = torch.stack([torch.as_tensor(mix[name]).float() for name in REWARDS], 1)
    rows = batch_of(policy, mixes)
    learner = Learner(policy.base, policy.model, REWARDS).eval()
    assert learner.shares == (kind != "softcap")  # that one's attention sees a window
    if shares and not learner.shares:
        return
    found = learner(**rows.batch(shares, "cpu")).detach().flatten()
    for i, (prompt, k) in enumerate(zip(rows.read, range(4), strict=True)):
        own = {name: float(w[k]) for name, w in weights.items()}
        plain = cf.Model(policy.merged(own, float(kl[k])))
        for j in (2 * i, 2 * i + 1):
            if rows.responses[j]:
                expected = cf.score(plain, [prompt], [rows.responses[j]]).totals[0]
                torch.testing.assert_close(found[j], expected, rtol=1e-4, atol=1e-4)
            else:
                assert float(found[j]) == 0.0
    reference = learner(**rows.reference_batch(shares, "cpu")).detach().flatten()
    torch.testing.assert_close(reference[6:], found[6:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_are_those_of_finite_differences(scope: str) -> None:
    base = make().eval().double()
    policy = shaken(policy_of(scope, base=base))
    policy.model.double()
    learner = Learner(base, policy.model, REWARDS).eval()
    rows = batch_of(policy, torch.tensor([[0.5, 0.2], [0.0, 0.9]], dtype=torch.float64))
    batch = rows.batch(True, "cpu")
    # one of each adapter's weights, of the first layer that has them, or the last
    chosen = [
        next(p for n, p in policy.model.named_parameters() if f"lora_{ab}.{name}" in n)
        for name in REWARDS
        for ab in "AB"
    ]
    for p in chosen:
        p.requires_grad_(True)
    learner(**batch).sum().backward()
    for p in chosen:
        at, step = (0, 0), 1e-2  # norms compute in float32, which a smaller step would show
        sums = []
        for sign in (1, -1):
            with torch.no_grad():
                p[at] += sign * step
                sums.append(learner(**batch).sum().item())
                p[at] -= sign * step
        expected = (sums[0] - sums[1]) / (2 * step)
        assert float(p.grad[at]) == pytest.approx(expected, rel=5e-3)


def test_decoding_finds_the_model_as_it_is() -> None:
    """A forward of the learner leaves PEFT's own scalings and switches alone."""
    policy = shaken(policy_of())
    learner = Learner(policy.base, policy.model, REWARDS)
    before = _switches(policy)
    learner(**batch_of(policy, torch.tensor([[0.5, 0.2], [0.0, 0.9]])).batch(True, "cpu"))
    assert _switches(policy) == before


def _switches(policy: Any) -> list[Any]:
    layers = adapter_layers(policy.model)
    return [({**m.scaling}, m._active_adapter, m._disable_adapters) for m in layers]


def test_models_that_cannot_be_told_what_a_token_sees_read_each_response_alone() -> None:
    """One whose attention has a window, one that has no positions to be given, and one that takes
    a mask and does not look at it."""
    assert takes_packed(make().eval())
    assert takes_packed(make().to(torch.bfloat16))
    assert not takes_packed(make("softcap"))
    sizes = {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    assert not takes_packed(BloomForCausalLM(BloomConfig(**sizes)))
    deaf = make().eval()
    read = deaf.model.forward
    deaf.model.forward = lambda attention_mask=None, **given: read(**given)
    assert not takes_packed(deaf)


# ---- the loss


def test_the_loss_is_the_paper_s_with_the_others_as_a_baseline() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs, reference, rewards = (torch.randn(3, 4, generator=generator) for _ in range(3))
    kl = torch.tensor([0.0, 0.3, 1.0])
    found = losses.clp(log_probs, reference, rewards, kl)
    for i in range(3):
        a = float(kl[i])
        returns = [
            (1 - a) * float(rewards[i, j]) - a * float(log_probs[i, j] - reference[i, j])
            for j in range(4)
        ]
        for j in range(4):
            others = [x for k, x in enumerate(returns) if k != j]
            expected = -(returns[j] - sum(others) / 3) * float(log_probs[i, j])
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_gradient_s_mean_is_that_of_the_objective() -> None:
    """Over all pairs of samples of a distribution over 4 responses, weighted by their chances."""
    logits = torch.tensor([0.3, -0.2, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.5, -0.3, 0.2], dtype=torch.float64).log_softmax(0)
    reward = torch.tensor([1.0, -0.5, 0.2, 0.7], dtype=torch.float64)
    a = 0.3
    log_p = logits.log_softmax(0)
    p = log_p.exp()
    objective = (1 - a) * (p * reward).sum() - a * (p * (log_p - reference)).sum()
    (expected,) = torch.autograd.grad(objective, logits, retain_graph=True)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    chance = p.detach()[pairs].prod(dim=1)
    each = losses.clp(
        log_p[pairs], reference[pairs], reward[pairs], torch.full((16,), a, dtype=torch.float64)
    )
    (found,) = torch.autograd.grad((chance * each.mean(dim=1)).sum(), logits)
    torch.testing.assert_close(-found, expected)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"log_probs": torch.zeros(3)}, ValueError, r"log_probs has shape \[3\]"),
        ({"rewards": torch.zeros(2, 3)}, ValueError, r"rewards has shape \[2, 3\]"),
        ({"kl": torch.zeros(3)}, ValueError, r"kl has shape \[3\]; it must be \[2\]"),
        ({"ref_log_probs": 0.0}, TypeError, "ref_log_probs is a float; it must be a tensor"),
    ],
)
def test_arguments_of_the_loss_that_do_not_fit(change: Any, error: type, says: str) -> None:
    given = {name: torch.zeros(2, 2) for name in ("log_probs", "ref_log_probs", "rewards")}
    with pytest.raises(error, match=says):
        losses.clp(**{**given, "kl": torch.zeros(2), **change})
    with pytest.raises(ValueError, match=r"\[prompts, n\], n at least 2"):
        losses.leave_one_out(torch.zeros(3, 1))


# ---- training


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scope", ["attention", "head"])
def test_a_step_changes_all_adapters_and_nothing_else(
    tmp_path: Path, scope: str, shared: bool
) -> None:
    base = make().eval()
    before = {n: p.clone() for n, p in base.named_parameters()}
    policy = shaken(policy_of(scope, base=base, shared=shared))
    first = weights_of(policy)
    trainer(tmp_path, policy, max_steps=1).train()
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert all(not torch.equal(p, first[n]) for n, p in weights_of(policy).items())


def test_a_new_policy_is_the_reference(tmp_path: Path) -> None:
    """Its first step's log-ratios are exactly 0: policy and reference take one path."""
    made = trainer(tmp_path, max_steps=1)
    made.train()
    (first,) = figures(made)
    assert first["kl"] == 0.0
    assert set(first) >= {"objective", "reward", "rewards/great", "rewards/short"}


def test_weights_steer_what_was_trained(tmp_path: Path) -> None:
    """Each reward is higher where it has the weight, and above the base's."""
    policy = policy_of()
    made = trainer(
        tmp_path,
        policy,
        max_steps=12,
        per_device_train_batch_size=8,
        num_generations=8,
        learning_rate=1e-1,
        concentration=0.3,
        kl=0.02,
        logging_steps=12,
    )
    made.train()
    prompts = [row["prompt"] for row in PROMPTS] * 8
    found = {}
    for name, blend in (
        ("base", cf.Model(policy.base, tokenizer=policy.tokenizer)),
        ("great", policy.at({"great": 1}, kl=0.02)),
        ("short", policy.at({"short": 1}, kl=0.02)),
    ):
        out = cf.generate(blend, prompts, do_sample=True, max_new_tokens=NEW, seed=0)
        found[name] = [sum(fn([], out.text)) / len(prompts) for fn in (great, short)]
    assert found["great"][0] > max(found["base"][0], found["short"][0]) + 0.1
    assert found["short"][1] > max(found["base"][1], found["great"][1]) + 0.1


def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    whole = policy_of("attention", shared=True)
    trainer(tmp_path / "whole", whole, max_steps=4, kl=[0.0, 0.5]).train()
    options = {"save_strategy": "steps", "save_steps": 2, "kl": [0.0, 0.5], "max_steps": 4}
    stopped = trainer(tmp_path / "parts", policy_of("attention", shared=True), **options)
    stopped.add_callback(_Stop(2))
    stopped.train()
    resumed = policy_of("attention", shared=True)
    trainer(tmp_path / "parts", resumed, **options).train(
        resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2")
    )
    for name, p in weights_of(whole).items():
        assert torch.equal(p, weights_of(resumed)[name]), name


def test_accumulated_batches_are_one(tmp_path: Path) -> None:
    one, parts = policy_of(), policy_of()
    trainer(tmp_path, one, max_steps=1).train()
    trainer(
        tmp_path, parts, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    ).train()
    for name, p in weights_of(one).items():
        torch.testing.assert_close(p, weights_of(parts)[name], rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    one, other = shaken(policy_of()), shaken(policy_of())
    trainer(tmp_path, one, max_steps=1).train()
    trainer(tmp_path, other, max_steps=1, gradient_checkpointing=True).train()
    for name, p in weights_of(one).items():
        torch.testing.assert_close(p, weights_of(other)[name], rtol=1e-4, atol=1e-6)


def test_what_is_saved_is_a_policy(tmp_path: Path) -> None:
    policy = shaken(policy_of("attention", shared=True))
    made = trainer(tmp_path, policy, max_steps=1)
    made.train()
    made.save_model()
    assert json.loads((tmp_path / "policy.json").read_text())["rewards"] == list(REWARDS)
    loaded = cf.ConditionedPolicy.load(tmp_path, make().eval(), tokenizer=policy.tokenizer)
    mix = {"great": 0.4, "short": 0.6}
    outs = [
        cf.generate(p.at(mix, kl=0.1), ["the film was"], max_new_tokens=8) for p in (policy, loaded)
    ]
    assert outs[0].responses == outs[1].responses


def test_evaluations_are_of_weights_that_stay(tmp_path: Path) -> None:
    made = trainer(tmp_path, shaken(policy_of()), eval_dataset=PROMPTS[:3])
    first = made.evaluate()
    made.state.global_step = 7
    again = made.evaluate()
    assert first["eval_objective"] == again["eval_objective"]
    assert {"eval_reward", "eval_rewards/great", "eval_kl", "eval_samples/length"} <= set(first)


def test_a_prompted_policy_is_told_its_weights(tmp_path: Path) -> None:
    """The policy reads them in its system prompt, and the reference reads the prompt alone."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    policy = PromptedPolicy.create(
        make().eval(), REWARDS, peft.LoraConfig(r=2), tokenizer, prompt=lambda w, kl: "w1 w2"
    )
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
    made = trainer(tmp_path, policy, train_dataset=chats, max_steps=1)
    written = made._write(made.train_dataset.rows[:2], 0, "step 1")
    for told, plain in zip(written.read, written.plain, strict=True):
        assert tokenizer.decode(told) == "w1 w2 " + tokenizer.decode(plain)
    before = weights_of(policy)
    made.train()
    made.save_model()
    assert any(not torch.equal(p, before[n]) for n, p in weights_of(policy).items())
    loaded = cf.models.with_adapters(make().eval(), {"prompted": tmp_path / "prompted"})
    again = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    assert all(torch.equal(p, again[n]) for n, p in weights_of(policy).items())


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step
