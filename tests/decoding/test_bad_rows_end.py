"""A row that cannot be drawn from ends alone, and a warning says why."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from draw_settings import DRAW, Batch, Only
from tiny_models import VOCAB
from transformers import PreTrainedModel


class Broken(torch.nn.Module):
    """Makes one row of a model's logits NaN, from the `after`-th call on."""

    def __init__(self, model: PreTrainedModel, row: int, after: int) -> None:
        super().__init__()
        self.model, self.config, self.row, self.left = model, model.config, row, after

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, **kwargs)
        if self.left <= 0:
            output.logits[self.row] = float("nan")
        self.left -= 1
        return output


@pytest.mark.parametrize("processors", [[], [Only(*range(5, VOCAB))]])
def test_a_bad_row_ends_alone(trio: list[PreTrainedModel], batch: Batch, processors: Any) -> None:
    sound = cf.Model(trio[0]) + 0.5 * cf.ValueHead(trio[1])
    broken = cf.Model(trio[0]) + 0.5 * cf.ValueHead(Broken(trio[1], row=2, after=3), name="judge")
    arguments = {"seed": 1, "logits_processor": processors, **DRAW, "return_kl_to_base": True}
    with pytest.warns(RuntimeWarning, match="request 2 was ended at its token 3: judge gave") as w:
        out = cf.generate(broken, batch, **arguments)
    assert len(w) == 1, "said once, not at every later step"
    expected = cf.generate(sound, batch, **arguments)
    assert out.lengths.tolist() == [12, 12, 3, 12]
    assert out.failed.tolist() == [False, False, True, False]
    assert not out.finished.any()
    for i in range(4):  # The other rows are as ever, and so is this one up to there.
        assert out.responses[i] == expected.responses[i][: int(out.lengths[i])]
    for values in (out.logprobs, out.sampled_logprobs, out.kl_to_base):
        assert values.isfinite().all()
        assert not values[2, 3:].any()


def test_a_bad_row_is_not_finished_by_its_padding(
    trio: list[PreTrainedModel], batch: Batch
) -> None:
    # Padding is EOS by default. A criterion that reads it must not call the row complete.
    broken = cf.Model(trio[0]) + 0.1 * cf.ValueHead(Broken(trio[1], row=2, after=1))
    with pytest.warns(RuntimeWarning, match="request 2"):
        out = cf.generate(broken, batch, max_new_tokens=4, eos_token_id=39, pad_token_id=39)
    assert out.failed.tolist() == [False, False, True, False]
    assert not out.finished[2]
    assert out.lengths[2] == 1


@pytest.mark.parametrize(("power", "weight"), [(0.0, float("nan")), (1.0, -0.5), (1.0, 0.7)])
def test_a_bad_weight_is_named(
    trio: list[PreTrainedModel], batch: Batch, power: float, weight: float
) -> None:
    w = torch.tensor([0.5, 0.5, weight, 0.5])
    models = tuple(map(cf.Model, trio[:2]))
    bad = cf.Blend(models, (0.5, w), power=power) + 0.5 * cf.ValueHead(trio[2])
    with pytest.warns(RuntimeWarning, match=r"request 2 was ended .*: its weights are \[0\.5, "):
        out = cf.generate(bad, batch, max_new_tokens=2, eos_token_id=None)
    assert out.failed.tolist() == [False, False, True, False]


def test_a_row_without_any_token(base: PreTrainedModel, batch: Batch) -> None:
    with pytest.warns(RuntimeWarning, match="no token has a finite score"):
        out = cf.generate(base, batch, max_new_tokens=5, suppress_tokens=list(range(VOCAB)))
    assert out.failed.all()
    assert out.lengths.tolist() == [0] * 4
    assert out.responses == [[]] * 4
