"""What a blend costs: the models of its terms, of which shared ones count once."""

from __future__ import annotations

import pytest
from crossfade.blends.blend import Model
from small_terms import LMS, A, B, Q, llama, lora

# PEFT reads a property that Transformers calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


class TestCost:
    def test_shared_models_count_once(self):
        size = sum(p.numel() for p in LMS[0].parameters())
        blend = A + 0.5 * (Model(LMS[0], system="s", name="s") - B) + Q
        assert [(c.names, c.forwards, c.parameters) for c in blend.models] == [
            (("a", "s"), 2, size),
            (("b",), 1, size),
            (("q",), 1, size),
        ]
        assert blend.models.total.forwards == 4
        assert blend.models.total.bytes == 12 * size
        lines = str(blend.models).splitlines()
        assert lines[0].startswith("3 models: 4 forwards a token, ")
        assert lines[1].startswith("  a, s [LlamaForCausalLM]: 2 forwards a token, ")

    def test_peft_wrapper_and_its_base_are_one(self):
        model = lora("x")
        (cost,) = (Model(model, adapter="x") - Model(model.get_base_model())).models
        assert cost.forwards == 2
        assert cost.parameters == sum(p.numel() for p in model.parameters())

    def test_shared_parameters_count_once(self):
        other = llama()
        other.lm_head = LMS[0].lm_head
        first, second = (A + Model(other)).models
        assert second.parameters == first.parameters - LMS[0].lm_head.weight.numel()
