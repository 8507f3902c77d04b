"""What can be a term, and what can be a blend."""

from __future__ import annotations

import pytest
from crossfade.blends.blend import Blend, Model, ValueHead, as_blend
from small_terms import CONFIG, LMS, A, B, Q, llama, lora, weights
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    LlamaForSequenceClassification,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
)

# PEFT reads a property that Transformers calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


class TestConstruction:
    def test_as_blend(self):
        blend = A + B
        assert as_blend(blend) is blend
        assert weights(as_blend(A)) == {"a": 1}
        assert as_blend(LMS[0]).terms == (A,)
        with pytest.raises(ValueError, match="values alone"):
            as_blend(2 * Q)
        for bad in ("model", None, 1.0, [A]):
            with pytest.raises(TypeError, match="blend is a"):
                as_blend(bad)

    def test_members(self):
        assert Blend((LMS[0],), (1,), (LMS[3],), (2,)).values == (Q,)
        with pytest.raises(TypeError, match="terms has a ValueHead"):
            Blend((Q,), (1,))
        with pytest.raises(TypeError, match="values has a Model"):
            Blend((A,), (1,), (A,), (1,))
        with pytest.raises(ValueError, match="weights has 2"):
            Blend((A,), (1, 2))
        with pytest.raises(TypeError, match="support is a dict"):
            Blend((A,), (1,), support={})

    def test_at_most_sixteen(self):
        many = [Model(LMS[0], system=str(i)) for i in range(17)]
        assert len(sum(many[:16]).terms) == 16
        with pytest.raises(ValueError, match="terms are 17"):
            sum(many)


class TestModel:
    @pytest.mark.parametrize(
        ("model", "match"),
        [
            ("gpt2", "str"),
            (None, "NoneType"),
            (nn.Linear(2, 2), "Linear"),
            (CONFIG, "LlamaConfig"),
            (LlamaModel(CONFIG), "no language modelling head"),
            (LlamaForSequenceClassification(CONFIG), "no language modelling head"),
        ],
    )
    def test_not_a_language_model(self, model, match):
        with pytest.raises(TypeError, match=match):
            Model(model)

    def test_unsupported_by_name(self):
        bart = BartConfig(
            vocab_size=64,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            max_position_embeddings=8,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
        )
        with pytest.raises(NotImplementedError, match=r"BartForCond.*encoder-decoder"):
            as_blend(BartForConditionalGeneration(bart))
        bart.is_encoder_decoder = False
        Model(BartForCausalLM(bart))
        mamba = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
        Model(MambaForCausalLM(mamba))  # whatever `generate` can run can be a term

    def test_any_module_with_a_config_will_do(self):
        class Own(nn.Module):
            config = CONFIG

            def forward(self, input_ids):
                return input_ids

        assert as_blend(Own()).names == ("model0",)
        ValueHead(LlamaModel(CONFIG))  # whether it has logits shows when it is called

    def test_adapters(self):
        model = lora("x", "y")
        for adapter in ("x", "y", "active", None):
            assert Model(model, adapter=adapter).adapter == adapter
        with pytest.raises(ValueError, match=r"'z'.*\['x', 'y'\]"):
            Model(model, adapter="z")
        with pytest.raises(ValueError, match="'x', which the LlamaForCausalLM does not have"):
            Model(LMS[0], adapter="x")
        with pytest.raises(TypeError, match="adapter is a int"):
            Model(model, adapter=1)
        Model(LMS[0], adapter=None)

    def test_the_model_inside_a_peft_model_has_its_adapters(self):
        """PEFT puts its layers into the base, so adapters can be switched there too."""
        inner = lora("x").get_base_model()
        for adapter in ("x", "active", None):
            assert Model(inner, adapter=adapter).adapter == adapter

    def test_prompt_learning_is_refused(self):
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(NotImplementedError, match="'default'"):
            Model(peft.get_peft_model(llama(), config))

    @pytest.mark.parametrize(
        ("settings", "error", "match"),
        [
            ({"system": 1}, TypeError, "system is a int"),
            ({"system": ["s", None]}, TypeError, r"system\[1\] is None; it must be a text"),
            ({"system": []}, ValueError, "system is an empty list"),
            ({"prompt": 1}, TypeError, "prompt is a int"),
            ({"prompt": []}, ValueError, "prompt is an empty list"),
            ({"name": 1}, TypeError, "name is a int"),
            ({"name": "two words"}, ValueError, "two words"),
            ({"name": "lambda"}, ValueError, "lambda"),
            ({"name": ""}, ValueError, "identifier"),
        ],
    )
    def test_bad_settings(self, settings, error, match):
        with pytest.raises(error, match=match):
            Model(LMS[0], **settings)
