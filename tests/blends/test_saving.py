"""Blends as plain data: what is saved is loaded, and anything else is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from crossfade.blends.blend import Blend, Model, as_blend
from crossfade.blends.power_mean import intersection, power_mean, union
from crossfade.ops import Support
from hypothesis import given, settings
from hypothesis import strategies as st
from small_terms import LMS, A, B, C, Q


class TestSaving:
    blend = (
        Model(LMS[0], name="a", system="be kind")
        + torch.tensor([0.5, 2.0]) * Model(LMS[0], name="b", prompt=["x", "y"])
        - 0.25 * Model(LMS[2], name="c", system=["be brief", "be dull"])
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

    @pytest.mark.parametrize(("blend", "r"), [(union(A, B), "inf"), (intersection(A, B), "-inf")])
    def test_infinite_powers(self, blend, r):
        """JSON has no number for them."""
        saved = blend.to_dict()
        assert saved["power"] == r
        saved = json.loads(json.dumps(saved, allow_nan=False))
        loaded = Blend.from_dict(saved, a=A, b=B)
        assert (loaded.power, loaded.to_dict()) == (float(r), saved)

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
            (
                ("terms", 0, "system"),
                ["be kind", 1],
                r"\['system'\] is \['be kind', 1\]; it must be",
            ),
            (
                ("terms", 0, "system"),
                [],
                r"\['system'\] is \[\]; it must be text, a list of texts or",
            ),
            (("terms", 1, "prompt"), {}, r"\['prompt'\] is {}; it must be text"),
            (("terms", 1, "prompt"), [], "must have one prompt a request"),
            (("power",), "1", r"d\['power'\] is '1'; it must be a number"),
            (("power",), math.nan, r"d\['power'\] is nan"),
            (("power",), math.inf, r"d\['power'\] is inf; it must be finite"),
            (("power",), "Infinity", r"d\['power'\] is 'Infinity'; it must be a number"),
            (("power",), [], r"d\['power'\] is \[\]; it must be a number"),
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
        """The path to every place in nested dicts and lists."""
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
        """It gives a blend that is saved as what was read, or an error that speaks of the data."""
        places = list(self.paths(self.blend.to_dict()))
        saved = self.changed(data.draw(st.sampled_from(places)), data.draw(self.junk))
        try:
            loaded = self.load(saved)
        except ValueError:
            return
        again = loaded.to_dict()
        assert self.load(again).to_dict() == again
        assert repr(loaded)
