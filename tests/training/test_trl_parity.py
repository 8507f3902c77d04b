"""Some of the cases of `bench/trl_parity.py`, which compares our trainers with TRL's own."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import trl_parity

CASES = {case.name: case for case in trl_parity.all_cases()}
CHOSEN = [
    "sft: evaluated",
    "sft: loss_type=dft, chats",
    "sft: completion_only_loss=False, ids",
    "sft: assistant_only_loss=True, messages",
    "sft: packing=True, packing_strategy=bfd, max_length=16, whole",
    "sft: router_aux_loss_coef=0.5, experts",
    "sft: prompt tuning",
    "dpo: loss_type=['sigmoid', 'bco_pair', 'sft'], loss_weights=[0.8, 0.2, 1.0], ld_alpha=0.4, "
    "precompute_ref_log_probs=True",
    "dpo: f_divergence_type=alpha_divergence, loss_type=['ipo']",
    "dpo: truncation_mode=keep_end, max_length=6",
    "dpo: sync_ref_model=True, ref_model_sync_steps=1",
    "dpo: LoRA, trained adapter",
    "dpo: LoRA on the head",  # both trainers refuse it
    "dpo: use_weighting=True",
    "dpo: use_weighting=True, soft cap",
    "dpo: loss_type=['discopop'], beta=0.3, by name",
    "dpo: loss_type=['bco_pair'], beta=0.3, by name",
    "dpo: loss_type=['aot'], beta=0.3, label_smoothing=0.1, by name",
    "dpo: loss_type=['aot_unpaired'], beta=0.3, label_smoothing=0.1, LoRA, by name",
    "dpo: loss_type=['sigmoid_norm'], use_weighting=True, by name",
    "dpo: loss_type=['aot'], use_weighting=True, by name",  # both trainers refuse it
    "kto: loss_type=apo_zero_unpaired, desirable_weight=0.5, beta=1.0",
    "kto: precompute_ref_log_probs=True, evaluated",
    "kto: gradient_accumulation_steps=3",
]

# TRL and PEFT warn while they train
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", CHOSEN)
def test_losses_metrics_and_gradients_are_trls(tmp_path: Path, name: str) -> None:
    found = trl_parity.compare(CASES[name], tmp_path)
    assert found["ok"], found
    both = name.endswith("on the head") or ("aot" in name and "use_weighting" in name)
    assert ("refused" in found) == both


@pytest.mark.parametrize("kind", trl_parity.KINDS)
def test_no_option_of_trl_is_left_out(kind: str) -> None:
    """Each option is compared, or listed as one that changes no loss; a new TRL's are seen here."""
    shared = {f.name for f in dataclasses.fields(TrainingArguments)}
    own = {f.name for f in dataclasses.fields(trl_parity.KINDS[kind][2])} - shared
    compared = {name for case in CASES.values() if case.kind == kind for name in case.options}
    assert own <= compared | trl_parity.NOT_COMPARED


def test_a_wrong_gradient_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossfade.training import fused_head

    plain = fused_head._of_tokens

    def off(*args: object) -> dict[str, object]:
        found = plain(*args)  # type: ignore[arg-type]
        logp = found["log_probs"]
        return {**found, "log_probs": logp.detach() + 1.01 * (logp - logp.detach())}

    monkeypatch.setattr(fused_head, "_of_tokens", off)
    found = trl_parity.compare(CASES["sft: defaults"], tmp_path)
    assert not found["ok"]
    assert found["gradients"] > 5e-3
