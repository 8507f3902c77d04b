"""Terms, values and their algebra: what a formula means, prints, costs and saves."""

from __future__ import annotations

import json
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from crossfade.blend import Blend, Model, ValueHead, as_blend, power_mean
from crossfade.ops import Support
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
)

# PEFT reads a property that Transformers calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
CONFIG = LlamaConfig(**SIZE, num_attention_heads=2, num_key_value_heads=1)


def llama(path: str = "") -> LlamaForCausalLM:
    model = LlamaForCausalLM(deepcopy(CONFIG))
    model.config.name_or_path = path
    return model


LMS = [llama() for _ in range(4)]
A, B, C = (Model(lm, name=name) for lm, name in zip(LMS[:3], "abc", strict=True))
Q = ValueHead(LMS[3], name="q")


def weights(blend) -> dict[str, float]:
    return dict(
        zip(
            (*blend.names, *blend.value_names),
            (*blend.weights, *blend.value_weights),
            strict=True,
        )
    )


def lora(*names: str):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(llama("org/base"), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


class TestAlgebra:
    def test_formula(self):
        blend = A + 0.8 * (B - C) + 1.5 * Q
        assert blend.terms == (A, B, C)
        assert blend.weights == (1.0, 0.8, -0.8)
        assert blend.values == (Q,)
        assert blend.value_weights == (1.5,)
        assert blend.power == 0.0
        assert blend.support is None

    @pytest.mark.parametrize(
        ("blend", "expected"),
        [
            (-A, {"a": -1}),
            (A * 2 / 4, {"a": 0.5}),
            (2 * A, {"a": 2}),
            (A - 2 * Q, {"a": 1, "q": -2}),
            (Q + A, {"a": 1, "q": 1}),
            (Q - A, {"a": -1, "q": 1}),
            (Q + Q, {"q": 2}),
            (A + B - (A + C) / 2, {"a": 0.5, "b": 1, "c": -0.5}),
            (sum([A, B]), {"a": 1, "b": 1}),
            (np.float32(0.5) * A, {"a": 0.5}),
            (A * np.int64(3), {"a": 3}),
        ],
    )
    def test_operators(self, blend, expected):
        assert weights(blend) == expected

    number = st.floats(-8, 8).map(lambda x: round(x, 3))
    vector = st.tuples(number, number, number, number)

    @staticmethod
    def of(x):
        return sum(w * t for w, t in zip(x, (A, B, C, Q), strict=True))

    @staticmethod
    def as_dict(blend):
        """Weights of all four, those left out being 0."""
        return pytest.approx({n: weights(blend).get(n, 0.0) for n in "abcq"}, abs=1e-9)

    @given(vector, vector, number)
    def test_laws(self, x, y, s):
        """The algebra is a vector space over the terms, whatever was left out on the way."""
        a, b = self.of(x), self.of(y)
        assert self.as_dict(a + b - b) == dict(zip("abcq", x, strict=True))
        expected = {n: s * (p + q) for n, p, q in zip("abcq", x, y, strict=True)}
        assert self.as_dict(s * (a + b)) == expected
        assert self.as_dict(s * a + s * b) == expected
        assert self.as_dict(a - b) == {n: p - q for n, p, q in zip("abcq", x, y, strict=True)}

    def test_operands_are_not_changed(self):
        blend = A + B
        assert weights(2 * blend + C) == {"a": 2, "b": 2, "c": 1}
        assert weights(blend) == {"a": 1, "b": 1}
        with pytest.raises(AttributeError):
            blend.power = 1.0

    @pytest.mark.parametrize("bad", [1, 0.5, torch.ones(2), "b", None, [B]])
    def test_other_summands(self, bad):
        for f in (lambda: A + bad, lambda: bad + A, lambda: A - bad, lambda: bad - A):
            with pytest.raises(TypeError):
                f()

    def test_bare_model_is_no_operand(self):
        with pytest.raises(TypeError, match="wrap it in Model"):
            A + LMS[1]
        with pytest.raises(TypeError, match="wrap it in Model"):
            LMS[1] - A

    @pytest.mark.parametrize(
        ("bad", "error", "match"),
        [
            (True, TypeError, "bool"),
            ("2", TypeError, "str"),
            (1j, TypeError, "complex"),
            (None, TypeError, "NoneType"),
            (B, TypeError, "Model"),
            (A + B, TypeError, "Blend|Model"),
            (np.ones(2), TypeError, "ndarray"),
            (float("nan"), ValueError, "nan"),
            (-math.inf, ValueError, "inf"),
            (10**400, ValueError, "inf"),
            (torch.ones(2, 2), ValueError, r"\[2, 2\]"),
            (torch.tensor(0.5), ValueError, r"\[\]"),
            (torch.ones(2, dtype=torch.bool), TypeError, "bool"),
            (torch.ones(2, dtype=torch.complex64), TypeError, "complex"),
        ],
    )
    def test_bad_weights(self, bad, error, match):
        for f in (lambda: A * bad, lambda: bad * A, lambda: Blend((A,), (bad,))):
            with pytest.raises(error, match=match):
                f()

    @pytest.mark.parametrize("bad", [0, "2", True, torch.ones(2), B, float("inf")])
    def test_bad_divisors(self, bad):
        with pytest.raises((TypeError, ValueError), match="divisor"):
            A / bad

    def test_overflow_of_a_product(self):
        with pytest.raises(ValueError, match=r"weights\[0\] is inf"):
            1e200 * (1e200 * A)


class TestTensorWeights:
    w = torch.tensor([0.5, 2.0])

    def test_both_sides(self):
        for blend in (self.w * A, A * self.w, A * self.w.double(), A * torch.tensor([1, 2]) * 1.0):
            assert blend.weights[0].dtype == torch.float32
        assert torch.equal((self.w * A).weights[0], self.w)
        assert torch.equal((-(A * self.w) / 2).weights[0], -self.w / 2)

    def test_merging(self):
        blend = A + self.w * (B - A) + self.w * B
        assert torch.equal(blend.weights[0], 1 - self.w)
        assert torch.equal(blend.weights[1], 2 * self.w)

    def test_zeros_in_a_tensor_stay(self):
        """Contents are not looked at: they may be on a device, and that would wait for it."""
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


class TestMerging:
    def test_same_settings_merge_and_keep_the_first_name(self):
        blend = Model(LMS[0], name="x") + Model(LMS[0], name="y")
        assert blend.terms == (Model(LMS[0]),)
        assert weights(blend) == {"x": 2}

    @pytest.mark.parametrize(
        "settings", [{"system": "s"}, {"prompt": "p"}, {"prompt": ["p"]}, {"tokenizer": object()}]
    )
    def test_other_settings_do_not(self, settings):
        assert len((Model(LMS[0]) + Model(LMS[0], **settings)).terms) == 2
        assert len((Model(LMS[0], **settings) + Model(LMS[0], **settings)).terms) == 1

    def test_adapters(self):
        model = lora("x", "y")
        terms = [Model(model, adapter=name) for name in ("x", "y", None, "active", "x")]
        assert sum(terms).weights == (2.0, 1.0, 1.0, 1.0)

    def test_weight_zero_costs_nothing(self):
        blend = A + 0 * (B - C) + 0.0 * Q
        assert blend.terms == (A,)
        assert blend.values == ()
        assert len(blend.models) == 1

    def test_the_base_stays(self):
        """Config, tokenizer and KL come from the first term: a fader at its end keeps it."""
        blend = (1 - 1.0) * A + 1.0 * B
        assert weights(blend) == {"a": 0, "b": 1}
        assert weights(0 * (A - B)) == {"a": 0}
        assert weights(0 * A + Q) == {"a": 0, "q": 1}

    def test_the_supports_term_stays(self):
        blend = Blend((A, C, B), (1, 0, 0), support=Support(term=2, top_k=3))
        assert weights(blend) == {"a": 1, "b": 0}
        assert blend.support == Support(term=1, top_k=3)

    def test_support_follows_a_merged_term(self):
        blend = Blend((A, A, B), (1, 1, 1), support=Support(term=2))
        assert blend.support.term == 1


class TestPowerMeanAndSupport:
    def test_power_mean(self):
        blend = power_mean([LMS[0], B], [0.25, 0.75], r=-1)
        assert blend.terms == (A, B)
        assert blend.weights == (0.25, 0.75)
        assert blend.power == -1.0
        assert power_mean([A, A], weights=[0.5, 0.5], r=1).weights == (1.0,)

    def test_power_zero_is_an_ordinary_blend(self):
        blend = power_mean([A, B], weights=[2, -3], r=0) + C
        assert weights(2 * blend) == {"a": 4, "b": -6, "c": 2}

    @pytest.mark.parametrize(
        ("models", "w", "r", "error", "match"),
        [
            ([A, B], [0.5, 0.4], 1, ValueError, "sum to 0.9"),
            ([A, B], [1.5, -0.5], 1, ValueError, "-0.5"),
            ([A, B], [1.0], 1, ValueError, "weights has 1"),
            ([A, B], 0.5, 1, TypeError, "weights is a float"),
            ([A, B], torch.ones(2), 1, TypeError, "weights is a Tensor"),
            (A, [1], 1, TypeError, "models is a Model"),
            ([], [], 1, ValueError, "models is empty"),
            ([A, Q], [0.5, 0.5], 1, TypeError, r"models\[1\]"),
            ([A, A + B], [0.5, 0.5], 1, TypeError, "Blend"),
            ([A, "b"], [0.5, 0.5], 1, TypeError, "str"),
            ([A, B], [0.5, 0.5], math.nan, ValueError, "r is nan"),
            ([A, B], [0.5, 0.5], math.inf, ValueError, "r is inf"),
            ([A, B], [0.5, 0.5], "1", TypeError, "r is '1'"),
            ([A, B], [0.5, 0.5], True, TypeError, "r is True"),
        ],
    )
    def test_bad_power_means(self, models, w, r, error, match):
        with pytest.raises(error, match=match):
            power_mean(models, w, r)

    def test_tensor_weights_are_left_to_the_kernels(self):
        w = torch.tensor([0.2, 0.9])
        assert power_mean([A, B], [w, 1 - w], r=1).row_weights(2).shape == (2, 2)
        with pytest.raises(ValueError, match="-1"):
            power_mean([A, B], [w, -1.0], r=1)

    fixed = (power_mean([A, B], [0.5, 0.5], r=1), (A + B).within(Support(top_k=2)))

    @pytest.mark.parametrize("blend", fixed)
    def test_only_values_can_be_added(self, blend):
        for sum_ in (blend + 2 * Q, 2 * Q + blend, blend - -2 * Q):
            assert sum_.terms == (A, B)
            assert sum_.value_weights == (2.0,)
            assert (sum_.power, sum_.support) == (blend.power, blend.support)
        for f in (
            lambda: blend + C,
            lambda: C + blend,
            lambda: blend - C,
            lambda: C - blend,
            lambda: blend + blend,
        ):
            with pytest.raises(ValueError, match=r"only values can|cannot be scaled"):
                f()

    @pytest.mark.parametrize("blend", fixed)
    def test_cannot_be_scaled(self, blend):
        assert (1 * blend / 1).weights == blend.weights
        for f in (
            lambda: 2 * blend,
            lambda: -blend,
            lambda: blend / 2,
            lambda: blend * torch.ones(2),
        ):
            with pytest.raises(ValueError, match="cannot be scaled"):
                f()

    def test_within(self):
        s = Support(term=1, top_p=0.5)
        blend = (A + B + Q).within(s)
        assert blend.support == s
        assert blend.within(s).support == s
        assert blend.within(None).support is None
        assert A.within(Support(top_k=1)).support == Support(top_k=1)
        with pytest.raises(ValueError, match="already"):
            blend.within(Support(top_k=1))
        with pytest.raises(ValueError, match=r"support\.term is 2"):
            (A + B).within(Support(term=2))
        with pytest.raises(ValueError, match=r"support\.term is 0"):
            (2 * Q).within(Support())
        with pytest.raises(TypeError, match="int"):
            A.within(3)


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
        Model(MambaForCausalLM(mamba))  # what generate can run is a term

    def test_any_module_with_a_config_will_do(self):
        class Own(nn.Module):
            config = CONFIG

            def forward(self, input_ids):
                return input_ids

        assert as_blend(Own()).names == ("model0",)
        ValueHead(LlamaModel(CONFIG))  # what its logits are is seen when it is called

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
        """PEFT puts its layers into the base, where they can be switched as well."""
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
        """From the path, as identifiers, and all different."""
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


class TestSaving:
    blend = (
        Model(LMS[0], name="a", system="be kind")
        + torch.tensor([0.5, 2.0]) * Model(LMS[0], name="b", prompt=["x", "y"])
        - 0.25 * C
    ).within(Support(term=1, top_p=0.5)) + 1.5 * Q

    def test_round_trip(self):
        saved = json.loads(json.dumps(self.blend.to_dict()))
        loaded = Blend.from_dict(saved, a=LMS[0], b=LMS[0], c=LMS[2], q=LMS[3])
        assert loaded.terms == self.blend.terms
        assert loaded.names == self.blend.names
        assert torch.equal(loaded.row_weights(2, "cpu"), self.blend.row_weights(2, "cpu"))
        assert loaded.values == self.blend.values
        assert loaded.value_weights == (1.5,)
        assert loaded.support == self.blend.support
        assert loaded.to_dict() == saved

    def test_power_mean(self):
        saved = power_mean([A, B], [0.5, 0.5], r=-1).to_dict()
        assert Blend.from_dict(saved, a=A, b=B).power == -1.0

    def test_tokenizers_come_with_the_models(self):
        tokenizer = object()
        loaded = Blend.from_dict(A.within(None).to_dict(), a=Model(LMS[0], tokenizer=tokenizer))
        assert loaded.terms[0].tokenizer is tokenizer

    def test_callable_prompts_cannot_be_saved(self):
        blend = A + Model(LMS[1], name="short", prompt=lambda text: text[-1:])
        with pytest.raises(TypeError, match="prompt of short is a function"):
            blend.to_dict()
        with pytest.raises(TypeError, match="prompt of short cannot be saved"):
            as_blend(Model(LMS[1], name="short", prompt=[{1, 2}])).to_dict()

    def test_bad_loads(self):
        saved = (A + B).to_dict()
        with pytest.raises(ValueError, match=r"models are \['a'\].*\['a', 'b'\]"):
            Blend.from_dict(saved, a=A)
        with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\]"):
            Blend.from_dict(saved, a=A, b=B, c=C)
        with pytest.raises(TypeError, match="b has a str"):
            Blend.from_dict(saved, a=A, b="b")
        with pytest.raises(ValueError, match="the settings in d"):
            Blend.from_dict(saved, a=A, b=Model(LMS[1], system="other"))
        with pytest.raises(ValueError, match="power"):
            Blend.from_dict({k: v for k, v in saved.items() if k != "power"}, a=A, b=B)

    @pytest.mark.parametrize("d", [[], {"terms": 3, "values": []}, {"terms": []}, "a + b", None])
    def test_junk_is_refused(self, d):
        with pytest.raises(ValueError, match=r"it must be what Blend\.to_dict gives"):
            Blend.from_dict(d)

    @pytest.mark.parametrize(
        ("path", "junk", "match"),
        [
            (("terms", 1, "weight"), [], r"d\['terms'\]\[1\]\['weight'\] is \[\]"),
            (("terms", 1, "weight"), [0.5, math.nan], r"\['weight'\]\[1\] is nan; it must be fin"),
            (("terms", 1, "weight"), [0.5, "1"], r"\['weight'\]\[1\] is '1'; it must be a number"),
            (("terms", 1, "weight"), [1.0, True], r"\[1\] is True"),
            (("terms", 1, "weight"), [[1.0, 2.0]], r"\[0\] is \[1.0, 2.0\]"),
            (("terms", 1, "weight"), [1.0, 1e300], r"has 1e\+300; it must be finite as a float32"),
            (("terms", 1, "weight"), [1.0, 10**400], "must be finite"),
            (("terms", 0, "weight"), math.nan, r"d\['terms'\]\[0\]\['weight'\] is nan"),
            (("terms", 0, "weight"), None, r"\['weight'\] is None; it must be a number"),
            (("values", 0, "weight"), -math.inf, r"d\['values'\]\[0\]\['weight'\] is -inf"),
            (("terms", 0), "a", r"d\['terms'\]\[0\] is 'a'; it must be what"),
            (("terms", 0), {"name": "a"}, "has no 'adapter'"),
            (("terms", 0, "name"), ["a"], r"\['name'\] is \['a'\]; it must be an identifier"),
            (("terms", 0, "name"), "b", r"\['name'\] is 'b', as another one's"),
            (("values", 0, "name"), "a", r"d\['values'\]\[0\]\['name'\] is 'a', as another"),
            (("terms", 0, "adapter"), 3, r"\['adapter'\] is 3; it must be text or None"),
            (("terms", 0, "adapter"), "gone", "adapter is 'gone'"),
            (("terms", 0, "system"), ["be kind"], r"\['system'\] is \['be kind'\]"),
            (("terms", 1, "prompt"), {}, r"\['prompt'\] is {}; it must be text"),
            (("terms", 1, "prompt"), [], "must have one prompt a request"),
            (("power",), "1", r"d\['power'\] is '1'; it must be a number"),
            (("power",), math.nan, r"d\['power'\] is nan"),
            (("power",), 1.0, "may be negative"),
            (("support",), 3, r"d\['support'\] is 3"),
            (("support", "term"), 3, "must be less than 3"),
            (("support", "top_k"), 1.5, r"d\['support'\]: Support.top_k is 1.5"),
            (("support", "topk"), 1, "has the key 'topk'"),
            (("values",), None, r"d\['values'\] is None"),
            (("sources",), {}, "d has the key 'sources'"),
        ],
    )
    def test_a_bad_key_is_named(self, path, junk, match):
        with pytest.raises(ValueError, match=match):
            self.load(self.changed(path, junk))

    def changed(self, path, junk):
        """The blend's dict with `junk` in one place."""
        saved = json.loads(json.dumps(self.blend.to_dict()))
        *way, last = path
        place = saved
        for key in way:
            place = place[key]
        place[last] = junk
        return saved

    @staticmethod
    def load(saved):
        return Blend.from_dict(saved, a=LMS[0], b=LMS[0], c=LMS[2], q=LMS[3])

    @staticmethod
    def paths(x, path=()):
        """Every place in nested dicts and lists."""
        items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
        for key, inner in items:
            yield (*path, key)
            yield from TestSaving.paths(inner, (*path, key))

    atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    known = st.sampled_from(["a", "b", "c", "q", "active", 10**400, -(10**400)])
    junk = st.recursive(
        atoms | known,
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(st.sampled_from(["name", "weight", "term", "x"]), x, max_size=3)
        ),
        max_leaves=4,
    )

    @settings(max_examples=40)
    @given(st.data())
    def test_whatever_stands_in_a_place(self, data):
        """A blend that saves as what was read, or an error of the data; never another one."""
        places = list(self.paths(self.blend.to_dict()))
        saved = self.changed(data.draw(st.sampled_from(places)), data.draw(self.junk))
        try:
            loaded = self.load(saved)
        except ValueError:
            return
        again = loaded.to_dict()
        assert self.load(again).to_dict() == again
        assert repr(loaded)
