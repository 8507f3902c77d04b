"""Wrong arguments of losses are named, with what they were and what they must be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from crossfade import losses
from crossfade.losses import PAIR_LOSSES, Pairs
from pair_cases import make

ROWS = torch.zeros(3)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"chosen": [1.0]}, TypeError, "chosen is a list; it must be a tensor"),
        ({"chosen": ROWS.long()}, TypeError, "chosen has dtype torch.int64; it must be float32 or"),
        ({"chosen": torch.zeros(3, 1)}, ValueError, r"chosen has shape \[3, 1\]; it must have 1"),
        ({"rejected": 0.0}, TypeError, "rejected is a float"),
        ({"rejected": torch.zeros(2)}, ValueError, r"rejected has shape \[2\]; it must be \[3\]"),
        ({"rejected": ROWS.to("meta")}, ValueError, "rejected is on meta; it must be on cpu"),
        ({"ref_chosen": torch.zeros(1)}, ValueError, r"ref_chosen has shape \[1\]"),
        ({"ref_chosen": ROWS.bool()}, TypeError, "ref_chosen has dtype torch.bool"),
        ({"ref_rejected": torch.tensor(0.0)}, ValueError, r"ref_rejected has shape \[\]"),
        ({"ref_rejected": "no"}, TypeError, "ref_rejected is a str"),
        ({"chosen_lengths": ROWS}, TypeError, "chosen_lengths has dtype .* be int64 or int32"),
        ({"chosen_lengths": [1, 2, 3]}, TypeError, "chosen_lengths is a list"),
        ({"rejected_lengths": ROWS[:2].int()}, ValueError, r"rejected_lengths has shape \[2\]"),
    ],
)
def test_bad_pairs(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"^{says}"):
        Pairs(**{"chosen": ROWS, "rejected": ROWS, **changes})


BAD_NUMBERS = [
    *[(name, "beta") for name in PAIR_LOSSES if name != "orpo"],
    ("orpo", "lam"),
    ("simpo", "gamma"),
    ("discopop", "tau"),
    *[
        (name, "label_smoothing")
        for name in ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
    ],
]


@pytest.mark.parametrize(("name", "option"), BAD_NUMBERS)
def test_bad_numbers(name: str, option: str) -> None:
    pairs, loss = make(), PAIR_LOSSES[name]
    for value in (None, "0.1", True, torch.tensor([0.1])):
        with pytest.raises(TypeError, match=f"^{option} is "):
            loss(pairs, **{option: value})
    wrong = [-0.1, math.inf, math.nan]
    wrong += [] if option == "gamma" or "smoothing" in option else [0.0]
    wrong += [0.5, 1.0] if "smoothing" in option else []
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{option} is {value}; it must be"):
            loss(pairs, **{option: value})


def test_exo_needs_smoothing() -> None:
    with pytest.raises(ValueError, match=r"^label_smoothing is 0.0; it must be above 0"):
        losses.exo_pair(make(), label_smoothing=0)


MODPO = {"pairs": Pairs(*[ROWS] * 4), "margins": torch.zeros(3, 1)}
MODPO |= {"weight": 0.5, "other_weights": [0.5]}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"margins": [[0.0]]}, TypeError, "margins is a list"),
        ({"margins": torch.zeros(3, 1).long()}, TypeError, "margins has dtype torch.int64"),
        ({"margins": ROWS}, ValueError, r"margins has shape \[3\]; it must be \[3, 1\]"),
        ({"margins": torch.zeros(2, 1)}, ValueError, r"margins has shape \[2, 1\]"),
        ({"margins": torch.zeros(3, 1).to("meta")}, ValueError, "margins is on meta"),
        ({"weight": 0.0}, ValueError, "weight is 0.0; it must be above 0"),
        ({"weight": None}, TypeError, "weight is None"),
        ({"other_weights": 0.5}, TypeError, "other_weights is a float; it must be a list"),
        ({"other_weights": [-0.5]}, ValueError, r"other_weights\[0\] is -0.5; it must be 0 or"),
        ({"other_weights": ["a"]}, TypeError, r"other_weights\[0\] is 'a'"),
        ({"other_weights": [0.2, 0.3]}, ValueError, r"margins has shape .* must be \[3, 2\]"),
        ({"beta": 0}, ValueError, "beta is 0.0"),
    ],
)
def test_bad_modpo(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"^{says}"):
        losses.modpo(**{**MODPO, **changes})


KTO = {"log_probs": ROWS, "ref_log_probs": ROWS, "labels": ROWS.bool(), "z0": 0.0}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"log_probs": 1.0}, TypeError, "log_probs is a float"),
        ({"log_probs": torch.zeros(3, 1)}, ValueError, r"log_probs has shape \[3, 1\]"),
        ({"ref_log_probs": torch.zeros(2)}, ValueError, r"ref_log_probs has shape \[2\]"),
        ({"ref_log_probs": ROWS.int()}, TypeError, "ref_log_probs has dtype torch.int32"),
        ({"labels": ROWS}, TypeError, "labels has dtype torch.float32; it must be bool"),
        ({"labels": ROWS[:2].bool()}, ValueError, r"labels has shape \[2\]"),
        ({"z0": ROWS}, ValueError, r"z0 has shape \[3\]; it must be \[\]"),
        ({"z0": torch.tensor(1)}, TypeError, "z0 has dtype torch.int64"),
        ({"z0": -1.0}, ValueError, "z0 is -1.0; it must be 0 or more"),
        ({"z0": None}, TypeError, "z0 is None"),
        ({"beta": -1.0}, ValueError, "beta is -1.0"),
        ({"desirable_weight": 0.0}, ValueError, "desirable_weight is 0.0"),
        ({"undesirable_weight": "1"}, TypeError, "undesirable_weight is '1'"),
    ],
)
def test_bad_kto(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"^{says}"):
        losses.kto(**{**KTO, **changes})


def test_bad_rows() -> None:
    with pytest.raises(ValueError, match=r"^log_probs has shape \[0\]; it must have at least 1"):
        losses.kto_z0(ROWS[:0], ROWS[:0])
    with pytest.raises(ValueError, match=r"^ref_log_probs has shape \[2\]"):
        losses.kto_z0(ROWS, ROWS[:2])
    with pytest.raises(TypeError, match=r"^log_probs is a list"):
        losses.sft([0.0])  # type: ignore[arg-type]
