"""What operators make of terms: sums, merged terms, and what cannot be added."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from crossfade.blends.blend import Blend, Model
from crossfade.blends.power_mean import intersection, power_mean, union
from crossfade.ops import Support
from hypothesis import given
from hypothesis import strategies as st
from small_terms import LMS, A, B, C, Q, lora, weights

# PEFT reads a property that Transformers calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


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
            (np.array(0.5) * A, {"a": 0.5}),
            (A * torch.tensor(0.5, requires_grad=True), {"a": 0.5}),
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
        """The weights of all four; a term that was left out has weight 0."""
        return pytest.approx({n: weights(blend).get(n, 0.0) for n in "abcq"}, abs=1e-9)

    @given(vector, vector, number)
    def test_laws(self, x, y, s):
        """Blends are a vector space over their terms, though terms of weight 0 may be left out."""
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
            (np.ones((2, 2)), ValueError, r"has \[1.0, 1.0\] among its entries"),
            (np.array(["1"]), TypeError, r"weight(s\[0\])?\[0\] is '1'; it must be a number"),
            (["1"], TypeError, r"\[0\] is '1'"),
            ([0.5, None], TypeError, r"\[1\] is None"),
            ([0.5, math.nan], ValueError, r"\[1\] is nan; it must be finite"),
            ([True, 0.5], TypeError, r"\[0\] is True"),
            ([], ValueError, "is empty; it must have a number for each request"),
            ([[0.5, 0.5]], ValueError, r"\[0.5, 0.5\] among"),
            ({"a": 1}, TypeError, "dict"),
            (float("nan"), ValueError, "nan"),
            (-math.inf, ValueError, "inf"),
            (10**400, ValueError, "inf"),
            (torch.ones(2, 2), ValueError, r"\[2, 2\]"),
            (torch.tensor(True), TypeError, "bool"),
            (torch.tensor(math.nan), ValueError, "nan"),
            (torch.ones(2, dtype=torch.bool), TypeError, "bool"),
            (torch.ones(2, dtype=torch.complex64), TypeError, "complex"),
        ],
    )
    def test_bad_weights(self, bad, error, match):
        for f in (lambda: A * bad, lambda: bad * A, lambda: Blend((A,), (bad,))):
            with pytest.raises(error, match=match):
                f()

    @pytest.mark.parametrize(
        ("bad", "says"),
        [
            (1.0, "multiplied by numbers: a \\+ 0.5"),
            (torch.ones(2), "multiplied by numbers"),
            ("tuned", "once it is loaded"),
            ([B], "one by one"),
            (len, "a search chooses by it: .*BestOfN"),
            (None, "a NoneType cannot be added"),
        ],
    )
    def test_what_to_do_instead(self, bad, says):
        for f in (lambda: A + bad, lambda: bad + A, lambda: A - bad, lambda: bad - A):
            with pytest.raises(TypeError, match=f"cannot be added to a blend; .*{says}|NoneType"):
                f()

    def test_models_do_not_multiply(self):
        for other in (B, A + B, Q, LMS[1]):
            for f in (lambda x: A * x, lambda x: x * A, lambda x: (A + B) * x):
                with pytest.raises(TypeError, match="models and values are added, as in a"):
                    f(other)
            with pytest.raises(TypeError, match=r"divisor is a .*log-probs are subtracted"):
                A / other

    @pytest.mark.parametrize("bad", [0, "2", True, torch.ones(2), B, float("inf")])
    def test_bad_divisors(self, bad):
        with pytest.raises((TypeError, ValueError), match="divisor"):
            A / bad

    def test_overflow_of_a_product(self):
        with pytest.raises(ValueError, match=r"weights\[0\] is inf"):
            1e200 * (1e200 * A)


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
        """A fader at its end keeps the first term, which gives config, tokenizer and KL."""
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

    def test_union_and_intersection(self):
        blend = union(LMS[0], B)
        assert (blend.terms, blend.weights, blend.power) == ((A, B), (0.5, 0.5), math.inf)
        assert intersection(A, B, C).power == -math.inf
        assert union(A, B, A).weights == (0.5, 0.5)
        assert weights(union(A)) == {"a": 1}

    @pytest.mark.parametrize(
        ("terms", "error", "match"),
        [
            ((), ValueError, r"union\(\) has no terms; it must have at least one Model"),
            (([A, B],), TypeError, r"terms\[0\] is a list; write union\(a, b\)"),
            ((A, Q), TypeError, r"terms\[1\] has a ValueHead; it must be a Model"),
            ((A, "b"), TypeError, r"terms\[1\] has a str"),
        ],
    )
    def test_bad_unions(self, terms, error, match):
        with pytest.raises(error, match=match):
            union(*terms)

    @pytest.mark.parametrize(
        ("models", "w", "r", "error", "match"),
        [
            ([A, B], [0.5, 0.4], 1, ValueError, "sum to 0.9"),
            ([A, B], [1.5, -0.5], 1, ValueError, "-0.5"),
            ([A, B], [1.0], 1, ValueError, "weights has 1"),
            ([A, B], 0.5, 1, TypeError, "weights is a float"),
            ([A, B], torch.ones(2), 1, ValueError, "weights sum to 2"),
            ([A, B], torch.ones(3), 1, ValueError, "weights has 3 members"),
            ([A, B], torch.ones(2, 2, 2), 1, TypeError, "weights is a Tensor"),
            ([A, B], {"a": 1}, 1, TypeError, "weights is a dict"),
            (A, [1], 1, TypeError, "models is a Model"),
            ([], [], 1, ValueError, "models is empty"),
            ([A, Q], [0.5, 0.5], 1, TypeError, r"models\[1\]"),
            ([A, A + B], [0.5, 0.5], 1, TypeError, "Blend"),
            ([A, "b"], [0.5, 0.5], 1, TypeError, "str"),
            ([A, B], [0.5, 0.5], math.nan, ValueError, "r is nan"),
            ([A, B], [0.5, 0.5], 10**400, ValueError, "r is inf"),
            ([A, B], [0.5, 0.6], math.inf, ValueError, "weights sum to 1.1"),
            ([A, B], [1.5, -0.5], -math.inf, ValueError, "-0.5"),
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
