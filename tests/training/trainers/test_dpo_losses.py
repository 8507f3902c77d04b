"""`DPOTrainer` with the losses of crossfade: their curves, rewards and options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import torch.nn.functional as F
from trained_models import texts
from trainer_runs import OLD_NAMES, curve, trainer

pytestmark = OLD_NAMES


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("sigmoid", {"lora": True}),
        ("sigmoid", {"lora": False}),
        ("apo_zero", {"lora": True}),
        ("apo_zero", {"lora": False}),
        ("sigmoid", {"lora": False, "model": "experts"}),
        ("sigmoid", {"adapter": peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)}),
    ],
    ids=str,
)
def test_loss_that_trl_has_too(tmp_path: Path, loss: str, options: dict[str, Any]) -> None:
    own = trainer("dpo", tmp_path / "a", **options, others={"loss": loss})
    trls = trainer("dpo", tmp_path / "b", trls=True, **options, loss_type=loss)
    for a, b in zip(curve(own), curve(trls), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-5), name


def pair_sums(made: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs ``[2, pairs]`` of the first batch, in float64, and lengths of the responses."""
    batch = next(iter(made.get_train_dataloader()))
    with torch.no_grad():
        z = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    mask = batch["completion_mask"][:, 1:]
    log_p = z[:, :-1].double().log_softmax(-1)
    logp = log_p.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * mask
    return logp.sum(1).view(2, -1), mask.sum(1).view(2, -1)


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_losses_without_reference(tmp_path: Path, loss: str) -> None:
    """The loss is that of the model's own logits, by hand, and no reference is loaded."""
    options = {"lam": 0.7} if loss == "orpo" else {"beta": 1.5, "gamma": 0.3}
    others = {"loss": loss, "loss_options": options}
    made = trainer("dpo", tmp_path, lora=False, others=others, max_steps=4)
    assert made.ref_model is None
    sums, lengths = pair_sums(made)
    chosen, rejected = sums / lengths
    if loss == "simpo":
        want = -F.logsigmoid(1.5 * (chosen - rejected) - 0.3)
    else:
        odds = [m - torch.log(1 - m.exp()) for m in (chosen, rejected)]
        want = -chosen - 0.7 * F.logsigmoid(odds[0] - odds[1])
    torch.manual_seed(made.args.seed)
    steps = curve(made)
    assert steps[0]["loss"] == pytest.approx(float(want.mean()), rel=1e-4)
    scale = 1.5 if loss == "simpo" else 1.0
    margin = scale * float((chosen - rejected).mean())
    assert steps[0]["rewards/margins"] == pytest.approx(margin, rel=1e-4, abs=1e-5)
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    assert steps[0]["logps/chosen"] == pytest.approx(float(sums[0].mean()), rel=1e-4)


def test_modpo(tmp_path: Path) -> None:
    """At the first step only the margins of the other objectives count."""
    rows = [{**row, "margins": [0.5 * i, -1.0]} for i, row in enumerate(texts(rows=4))]
    options = {"weight": 0.4, "other_weights": [0.2, 0.4], "beta": 0.3}
    others = {"loss": "modpo", "loss_options": options}
    given = {"rows": rows, "per_device_train_batch_size": 4}
    first = curve(trainer("dpo", tmp_path / "a", others=others, **given))[0]
    want = [math.log1p(math.exp((0.2 * 0.5 * i - 0.4) / 0.4)) for i in range(4)]
    assert first["loss"] == pytest.approx(sum(want) / 4, rel=1e-5)
    # with weight 1 and no other objectives the loss is DPO's, whether references are computed
    # before training or during it
    rows = [{**row, "margins": []} for row in rows]
    others["loss_options"] = {"weight": 1.0, "other_weights": [], "beta": 0.1}
    given["rows"] = rows
    eval_rows = datasets.Dataset.from_list(rows)
    for ready in (False, True):
        made = trainer(
            "dpo", tmp_path / "b", others=others, precompute_ref_log_probs=ready, **given
        )
        plain = curve(trainer("dpo", tmp_path / "c", **{**given, "rows": texts(rows=4)}))
        for a, b in zip(curve(made), plain, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert made.evaluate(eval_rows)["eval_loss"] < math.log(2)


def test_weighting(tmp_path: Path) -> None:
    """The first loss, by hand: SimPO's of each pair, times the product of two mean likelihoods.

    Each token's likelihood is over what the policy gives to its own draws, in expectation.
    """
    others = {"loss": "simpo", "loss_options": {"beta": 1.5, "gamma": 0.3}}
    made = trainer("dpo", tmp_path, lora=False, others=others, use_weighting=True)
    batch = next(iter(made.get_train_dataloader()))
    with torch.no_grad():
        z = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p = z[:, :-1].double().log_softmax(-1)
    mask = batch["completion_mask"][:, 1:]
    level = (2 * log_p).logsumexp(-1)
    likely = log_p.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    w = (((likely - level) * mask).sum(1) / mask.sum(1)).exp().view(2, -1).prod(0)
    sums, lengths = pair_sums(made)
    chosen, rejected = sums / lengths
    want = (w * -F.logsigmoid(1.5 * (chosen - rejected) - 0.3)).mean()
    torch.manual_seed(made.args.seed)
    assert curve(made)[0]["loss"] == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize(
    ("others", "options", "message"),
    [
        ({"loss": "dpo"}, {}, "loss is 'dpo'; .* modpo; it is called 'sigmoid' here"),
        ({"loss": "aot_pair"}, {}, "loss is 'aot_pair'; .*; it is called 'aot' here"),
        ({"loss": "sigmiod"}, {}, "loss is 'sigmiod'; .*; did you mean 'sigmoid'"),
        (
            {"loss": "robust", "loss_options": {"label_smoothng": 0.1}},
            {},
            "the key 'label_smoothng'; for .*; did you mean 'label_smoothing'",
        ),
        ({"loss_options": {"beta": 1.0}}, {}, "loss is None"),
        (
            {"loss": "simpo", "loss_options": {"lam": 1.0}},
            {},
            "'lam'; for loss='simpo' it may have beta",
        ),
        ({"loss": "simpo", "loss_options": {"beta": -1.0}}, {}, "beta is -1.0"),
        (
            {"loss": "sigmoid"},
            {"beta": 0.5},
            "args.beta is 0.5, .* loss_options={'beta': 0.5}",
        ),
        ({"loss": "orpo"}, {"beta": 0.5}, "args.beta is 0.5, .* has no such option, but lam"),
        (
            {"loss": "discopop"},
            {"discopop_tau": 0.5},
            "args.discopop_tau is 0.5, .* give loss_options={'tau': 0.5}",
        ),
        (
            {"loss": "simpo"},
            {"label_smoothing": 0.1},
            "args.label_smoothing is 0.1, .* no such option, but beta, gamma",
        ),
        ({"loss": "sigmoid"}, {"loss_type": "ipo"}, r"args.loss_type is \['ipo'\], .* leave out"),
        ({"loss": "sigmoid"}, {"ld_alpha": 0.5}, "args.ld_alpha is 0.5, .* discounts the tokens"),
        (
            {"loss": "sigmoid"},
            {"f_divergence_type": "js_divergence"},
            "args.f_divergence_type is 'js_divergence', .* another divergence",
        ),
        (
            {"loss": "sigmoid"},
            {"f_alpha_divergence_coef": 0.3},
            "args.f_alpha_divergence_coef is 0.3, .* belongs to an f-divergence",
        ),
        (
            {"loss": "sigmoid"},
            {"loss_weights": [2.0]},
            r"args.loss_weights is \[2.0\], .* weighs several losses",
        ),
        (
            {"loss": "aot"},
            {"use_weighting": True},
            "use_weighting is True, .* sorts the batch",
        ),
        ({"loss": "simpo"}, {"precompute_ref_log_probs": True}, "has no reference"),
        ({"loss": "modpo"}, {}, "no 'weight'"),
        (
            {"loss": "modpo", "loss_options": {"weight": 1.0, "other_weights": [1.0]}},
            {},
            "must have margins",
        ),
    ],
)
def test_losses_that_do_not_fit(
    tmp_path: Path, others: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer("dpo", tmp_path, others=others, **options)
