"""Models as options name them: whatever is given is read, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from crossfade import models
from crossfade.specs import Spec
from hypothesis import example, given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters() | st.sampled_from("=@/~.ab")), st.sampled_from([None, "model"]))
@example("a=/x@", None)
@example("a=@x", None)
@example("a=~x@sentiment", None)
def test_any_spec_is_one_or_an_error(text: str, name: str | None) -> None:
    try:
        spec = Spec.read(text, name)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) or "\n" in text  # noqa: PT017
    else:
        assert spec.name.isidentifier()
        assert spec.path


@pytest.mark.parametrize("name", ["a@b", "a@b@c"])
def test_a_folder_may_have_the_sign_of_a_guide_in_its_name(tmp_path: Path, name: str) -> None:
    folder, guide = tmp_path / name, tmp_path / "g@h"
    for made in (folder, guide):
        made.mkdir()
    (guide / "value_head.json").touch()
    assert Spec.read(f"x={folder}") == Spec("x", str(folder))
    assert Spec.read(f"x={folder}@{guide}") == Spec("x", str(folder), guide)
    assert Spec.read(f"x={folder}@sentiment").guide == models.guide("sentiment")
