"""Checks that all parts of the package use."""

from crossfade.checks import did_you_mean


def test_a_near_name_is_suggested() -> None:
    assert did_you_mean("temprature", ["temperature", "top_k"]) == "; did you mean 'temperature'?"


def test_a_name_that_is_near_to_none_has_no_suggestion() -> None:
    assert did_you_mean("colour", ["temperature", "top_k"]) == ""


def test_a_name_of_another_library_has_its_own_words() -> None:
    meant = {"max_tokens": "max_new_tokens is the limit here"}
    found = did_you_mean("max_tokens", ["max_time"], meant)
    assert found == "; max_new_tokens is the limit here"
