"""Weights that are tensors, one number a request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from crossfade import presets
from crossfade.blends.blend import Blend
from crossfade.blends.power_mean import power_mean
from crossfade.blends.values import Reward
from small_terms import A, B, C, Q


class TestTensorWeights:
    w = torch.tensor([0.5, 2.0])

    def test_both_sides(self):
        for blend in (self.w * A, A * self.w, A * self.w.double(), A * torch.tensor([1, 2]) * 1.0):
            assert blend.weights[0].dtype == torch.float32
        assert torch.equal((self.w * A).weights[0], self.w)
        assert torch.equal((-(A * self.w) / 2).weights[0], -self.w / 2)

    @pytest.mark.parametrize(
        "w", [[0.5, 2], (0.5, 2.0), np.array([0.5, 2.0]), [torch.tensor(0.5), np.float32(2.0)]]
    )
    def test_lists_and_arrays(self, w):
        for blend in (w * A, A * w, -(w * -A), Blend((A,), (w,)), power_mean([A], [w], r=0)):
            assert torch.equal(blend.weights[0], self.w)
            assert blend.weights[0].dtype == torch.float32
        value = w * Reward(max)
        assert torch.equal(value.weights[0], self.w)
        assert torch.equal(presets.eft(A, B, B, beta=w).weights[1], 0 * self.w)

    def test_weights_of_all_terms_as_one_array(self):
        for each in (np.array([0.25, 0.75]), torch.tensor([0.25, 0.75])):
            assert power_mean([A, B], each, r=1).weights == (0.25, 0.75)
            assert presets.genarm(A, [B, C], each).weights == (1.0, 0.25, 0.75)
        rows = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
        assert torch.equal(presets.mod([A, B], rows).row_weights(3, "cpu"), rows)

    def test_merging(self):
        blend = A + self.w * (B - A) + self.w * B
        assert torch.equal(blend.weights[0], 1 - self.w)
        assert torch.equal(blend.weights[1], 2 * self.w)

    def test_zeros_in_a_tensor_stay(self):
        """The contents of a tensor are not looked at, as that would wait for its device."""
        blend = A + torch.zeros(2) * B + self.w * Q - self.w * Q
        assert blend.terms == (A, B)
        assert blend.values == (Q,)

    def test_the_callers_tensor_can_change(self):
        w = self.w.clone()
        blends = w * A, Blend((A,), (w,)), power_mean([A, B], [w, w], r=1)
        w.zero_()
        assert all(torch.equal(blend.weights[0], self.w) for blend in blends)

    def test_gradients_stay_outside(self):
        assert not (self.w.clone().requires_grad_() * A).weights[0].requires_grad

    def test_lengths_must_agree(self):
        with pytest.raises(ValueError, match=r"name='a'.* are \[2\] and \[3\]"):
            self.w * A + torch.ones(3) * A
        with pytest.raises(ValueError, match=r"\[3\].*\[2\]"):
            torch.ones(3) * (self.w * A)

    def test_row_weights(self):
        assert (A - 2 * B).row_weights(3) == (1.0, -2.0)
        blend = A + self.w * B + Q
        rows = blend.row_weights(2, "cpu")
        assert rows.dtype == torch.float32
        assert rows.tolist() == [[1.0, 0.5], [1.0, 2.0]]
        assert blend.row_value_weights(2) == (1.0,)
        assert (A + self.w * Q).row_value_weights(2, "cpu").tolist() == [[0.5], [2.0]]
        assert A.__add__(B).row_value_weights(2) == ()

    def test_row_weights_name_the_term(self):
        with pytest.raises(ValueError, match=r"weight of b is a tensor \[2\]; it must be \[3\]"):
            (A + self.w * B).row_weights(3)
        with pytest.raises(ValueError, match="weight of q"):
            (A + self.w * Q).row_value_weights(3)
