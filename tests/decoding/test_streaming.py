"""A streamer gets what Hugging Face gives it: the prompts, every step's tokens, and one end."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine.group import Group
from crossfade.decoding.engine.modules import Unsupported
from streamers import Kept
from tiny_models import make
from torch import Tensor
from transformers import PreTrainedModel

PROMPTS = torch.tensor([[7, 9, 30], [8, 9, 11]])
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "progress": False}
SIMPLE = cf.Engine(simple=True)


def told_by_hugging_face(model: PreTrainedModel, **arguments: Any) -> list[Any]:
    kept = Kept()
    model.generate(PROMPTS, max_new_tokens=5, pad_token_id=0, streamer=kept, **arguments)
    return kept.told


@pytest.mark.parametrize("engine", [None, SIMPLE], ids=["engine", "simple"])
def test_it_is_told_what_hugging_face_tells(engine: Any, base: PreTrainedModel) -> None:
    theirs = told_by_hugging_face(base)
    for arguments in ({}, {"max_batch": 2}, {"max_batch": 5}, {"repetition_penalty": 1.0}):
        ours = Kept()
        cf.generate(base, PROMPTS, streamer=ours, engine=engine, **arguments, **GREEDY)
        assert ours.told == theirs


def test_samples_are_streamed_as_rows(base: PreTrainedModel) -> None:
    kept = Kept()
    arguments = {**GREEDY, "do_sample": True, "seed": 1, "num_return_sequences": 3}
    out = cf.generate(base, PROMPTS, streamer=kept, **arguments)
    prompts, *tokens, end = kept.told
    assert prompts == PROMPTS.repeat_interleave(3, 0).tolist()
    assert torch.equal(torch.tensor(tokens).T, out.sequences[:, 3:])
    assert end == "end"


def test_all_its_rows_are_decoded_at_a_time(base: PreTrainedModel) -> None:
    kept = Kept()
    with pytest.raises(ValueError, match="max_batch is 1; with a streamer it must be at least the"):
        cf.generate(base, PROMPTS, streamer=kept, max_batch=1, **GREEDY)
    assert kept.told == []


@pytest.mark.parametrize("at", [0, 3])
def test_a_model_that_shows_late_that_the_engine_cannot_run_it(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simple path begins anew, and the streamer is told nothing twice."""
    model = make("qwen3")
    theirs = told_by_hugging_face(model)
    # After this call the engine has met the model, and will not check it again.
    cf.generate(model, PROMPTS, **GREEDY)
    step, count = Group.step, iter(range(10**6))

    def failing(self: Group, *args: Any) -> Any:
        if next(count) == at:
            raise Unsupported("it is a test")
        return step(self, *args)

    monkeypatch.setattr(Group, "step", failing)
    kept = Kept()
    out = cf.generate(model, PROMPTS, streamer=kept, **GREEDY)
    assert out.stats.notes == ("the simple path: it is a test",)
    assert kept.told == theirs


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.filterwarnings("ignore:interrupted when:RuntimeWarning")
def test_it_is_told_the_end_whatever_happens(
    error: type[BaseException], base: PreTrainedModel
) -> None:
    """Without the end, a thread that waits for the streamer's text would wait for ever."""
    theirs = told_by_hugging_face(base)

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if ids.shape[1] == 5:
            raise error("stop")
        return torch.zeros(len(ids), dtype=torch.bool)

    kept = Kept()
    with suppress(error):
        cf.generate(base, PROMPTS, streamer=kept, stopping_criteria=[stop], **GREEDY)
    assert kept.told == [*theirs[:3], "end"]


def test_its_own_error_is_the_callers(base: PreTrainedModel) -> None:
    kept = Kept(fails_at=2)
    with pytest.raises(OSError, match="the line is cut"):
        cf.generate(base, PROMPTS, streamer=kept, **GREEDY)
    assert kept.told[-1] == "end"


def test_what_no_path_can_run_is_said_once(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simple path may refuse a model in the middle too, and then nothing else is tried."""

    def refuse(*_: Any) -> Any:
        raise Unsupported("it is a test")

    monkeypatch.setattr("crossfade.decoding.simple.runner.CachedTerm.step", refuse)
    with pytest.raises(NotImplementedError, match="the simple path: it is a test"):
        cf.generate(base, PROMPTS, engine=SIMPLE, **GREEDY)
