"""`Inputs` and `Draw`, which backends are handed: they hold what the public ops were given."""

import inspect
from typing import Any

import pytest
import torch
from cases import good_call, matrices, structs
from crossfade import ops
from crossfade.ops import Draw, Inputs, Support


def defaults(of: Any) -> dict[str, Any]:
    parameters = inspect.signature(of).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "inputs"}


def test_arguments_are_those_of_the_public_ops() -> None:
    """By name and by default: whoever adds a setting adds it to the struct that carries it."""
    backend = {"backend": None}
    assert defaults(Inputs) | backend == defaults(ops.blend)
    results = {"return_term_logprobs": False, "return_pushes": False, "return_partial": False}
    both = defaults(Inputs) | defaults(Draw) | backend | results
    assert both == defaults(ops.blend_sample)


def test_public_names() -> None:
    """Each op, and each type that one of them takes or returns."""
    types = ["BlendSample", "Draw", "Inputs", "LinearLogp", "Lora", "Packed", "Part", "Partial"]
    run = ["all_gather", "attend_", "blend", "blend_sample", "chunk_select", "fork_cache_"]
    assert ops.__all__ == [*types, "Support", *run, "linear", "linear_logp", "merge"]


def test_inputs() -> None:
    z, q = matrices(2), matrices(1)
    i = Inputs(z, [1, 0.5], q, [2.0], 1e-40 * 0, Support(top_k=3), torch.ones(9) > 0, 7)
    assert (i.logits, i.values, i.weights, i.value_weights) == (z, q, (1, 0.5), (2.0,))
    assert (i.power, i.support, i.vocab_size) == (0.0, Support(top_k=3), 7)
    assert (i.rows, i.device, i.mask.shape) == (3, torch.device("cpu"), (7,))


def test_inputs_that_are_converted() -> None:
    """Numbers of float64 are rounded to float32; what needs no change is not copied."""
    z = matrices(2)
    w = torch.tensor([0.1, 0.2], dtype=torch.float64)
    i = Inputs([z[0], z[1].double()], w)
    assert i.logits[0] is z[0]
    assert i.logits[1].dtype == i.weights.dtype == torch.float32
    assert (i.values, i.value_weights, i.mask, i.vocab_size) == ((), (), None, 8)


def test_draw() -> None:
    inputs = Inputs(matrices(1), [1.0])
    count = torch.arange(3)
    d = Draw(inputs, 0.5, torch.tensor(4), seed=2**64 - 1, step=count.int())
    assert (d.temperature, d.top_p, d.min_p, d.do_sample, d.seed) == (
        0.5,
        1.0,
        0.0,
        True,
        2**64 - 1,
    )
    assert d.top_k.tolist() == [4, 4, 4]
    assert torch.equal(d.step, count)
    assert d.step.dtype == torch.int64


@pytest.mark.parametrize("name", ["weights", "mask", "temperature", "seed", "step"])
def test_nothing_is_made_of_bad_arguments(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        structs(**good_call("cpu") | {name: "bad"})
