"""A blend prints as its formula, with a name for each term."""

from __future__ import annotations

import pytest
import torch
from crossfade.blends.blend import Model, ValueHead
from crossfade.blends.power_mean import power_mean
from crossfade.ops import Support
from small_terms import LMS, A, B, C, Q, llama, lora

# PEFT reads a property that Transformers calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


class TestText:
    @pytest.mark.parametrize(
        ("blend", "text"),
        [
            (A + 0.8 * (B - C), "a + 0.8*b - 0.8*c"),
            ((1 - 0.8) * A + 0.8 * B, "0.2*a + 0.8*b"),
            (-A + B, "-a + b"),
            (-0.5 * A, "-0.5*a"),
            (-1 * (0 * A) + B, "0*a + b"),
            (A + 1.5 * Q, "a + 1.5*q"),
            (A - Q, "a - q"),
            (-2 * Q, "-2*q"),
            (1e-7 * A + 3e20 * B, "1e-07*a + 3e+20*b"),
            (power_mean([A, B], [0.5, 0.5], r=-1), "power_mean([a, b], weights=[0.5, 0.5], r=-1)"),
            (A.within(Support(top_k=4)) + Q, "a.within(Support(term=0, top_k=4)) + q"),
            (
                (1.5 * A - 0.5 * B).within(Support(min_p=0.1)),
                "(1.5*a - 0.5*b).within(Support(term=0, min_p=0.1))",
            ),
            (torch.tensor([0.5, 2]) * A, "[0.5, 2]*a"),
            (A - torch.ones(9) * B, "a + [-1, -1, -1, -1, 9 requests]*b"),
        ],
    )
    def test_formula(self, blend, text):
        assert str(blend) == repr(blend) == text

    def test_names(self):
        """Names come from the paths of models, are identifiers, and all differ."""
        paths = ["org/Smol-LM2.1", "org/Smol-LM2.1/", "/a/7b", "", "x/class"]
        blend = sum(map(Model, map(llama, paths))) + ValueHead(llama("")) + ValueHead(llama("7b"))
        assert blend.names == ("Smol_LM2_1", "Smol_LM2_1_2", "_7b", "model3", "model4")
        assert blend.value_names == ("value0", "_7b_2")

    def test_names_of_adapters(self):
        model = lora("x", "y")
        blend = sum(Model(model, adapter=name) for name in (None, "x", "y", "active"))
        assert blend.names == ("base", "x", "y", "base_2")

    def test_a_given_name_that_looks_numbered(self):
        blend = Model(LMS[0], name="x") + Model(LMS[1], name="x_2") + Model(LMS[2], name="x")
        assert blend.names == ("x", "x_2", "x_3")

    def test_terms_print_without_their_modules(self):
        assert repr(Model(LMS[0], name="a", system="s")) == (
            "Model(LlamaForCausalLM, system='s', name='a')"
        )
        assert repr(Q) == "ValueHead(LlamaForCausalLM, name='q')"
