"""The ops under `torch.compile`: one graph, the same results, and a registration that holds."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import Backend, good_call, normal
from crossfade import ops
from crossfade.ops import BlendSample, Support
from torch import Tensor

GRAPHS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def _forget_graphs(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames and request.getfixturevalue("backend").interpreted:
        pytest.skip("the graph is that of the other backends; an interpreter adds only time")
    torch._dynamo.reset()


def compiled(op: Any, graph: str, **options: Any) -> Any:
    return torch.compile(op, fullgraph=True, backend=graph, **options)


def assert_same(got: BlendSample, want: BlendSample) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_argument(backend: Backend, graph: str) -> None:
    call = good_call(backend.device)
    assert_same(compiled(backend.blend_sample, graph)(**call), backend.blend_sample(**call))
    call |= {"parts": (), "return_pushes": True}
    assert_same(compiled(backend.blend_sample, graph)(**call), backend.blend_sample(**call))
    call = good_call(backend.device, sample=False)
    got = compiled(backend.blend, graph)(**call)
    torch.testing.assert_close(got, backend.blend(**call))


@pytest.mark.parametrize("graph", GRAPHS)
def test_settings_in_tensors(backend: Backend, graph: str) -> None:
    """The ops stand between other operations, as in a loop, with the largest seed there is."""
    on = {"device": backend.device}

    def step(z: Tensor, weights: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        drawn = backend.blend_sample(
            [z * 2, z + 1], weights, temperature=count / 2 + 0.5, seed=2**64 - 1, step=count
        )
        return drawn.tokens + 1, drawn.logprobs.exp()

    args = normal(3, 20, 1, **on), normal(3, 2, 2, **on), torch.arange(3, **on)
    for got, want in zip(compiled(step, graph)(*args), step(*args), strict=True):
        torch.testing.assert_close(got, want)


def test_defaults(backend: Backend) -> None:
    """A call without values, truncation or log-probs of terms."""
    z = [normal(2, 20, k, device=backend.device) for k in range(2)]

    def draw(z: list[Tensor]) -> BlendSample:
        return backend.blend_sample(z, [1.0, -0.5], seed=3, step=0)

    assert_same(compiled(draw, "aot_eager")(z), draw(z))
    assert draw(z).term_logprobs is None
    assert draw(z).pushes is None


def test_sizes_that_change(backend: Backend) -> None:
    """One graph for all batches and vocabularies, and for all steps given as numbers."""
    counter = torch._dynamo.testing.CompileCounter()

    def draw(z: Tensor, weights: Tensor, step: Tensor) -> BlendSample:
        return backend.blend_sample([z, z * 0.5], weights, top_k=5, seed=3, step=step)

    run = torch.compile(draw, fullgraph=True, backend=counter, dynamic=True)
    weights = torch.tensor([1.0, 0.5], device=backend.device)
    for rows, vocab in ((4, 20), (3, 33), (5, 64)):
        z = normal(rows, vocab, rows, device=backend.device)
        step = torch.tensor(rows, device=backend.device)
        assert_same(run(z, weights, step), draw(z, weights, step))
    assert counter.frame_count == 1


def test_bad_calls_raise(backend: Backend) -> None:
    call = good_call(backend.device)
    with pytest.raises(Exception, match="temperature is -1"):
        compiled(backend.blend_sample, "eager")(**{**call, "temperature": -1.0})


def schema_args(backend: Backend, sample: bool, **changes: Any) -> tuple[Any, ...]:
    """The arguments of a registered op, in its schema's order."""
    on = {"device": backend.device}
    call: dict[str, Any] = {
        "logits": [normal(3, 20, k, **on) for k in range(2)],
        "weights": torch.tensor([[1.0, 0.5], [0.3, 0.7], [2.0, -1.0]], **on),
        "values": [normal(3, 20, 5, **on)],
        "value_weights": torch.tensor([0.5], **on),
        "power": 0.0,
        "support": [1.0, 12.0, 0.99, 0.001],
        "mask": torch.arange(18, **on) % 4 != 0,
        "vocab_size": 18,
        "part_weights": torch.tensor([0.0, 1.0, 0.5, 0.5], **on),
        "parts": [0.0, -1.0, 1.0, float("inf"), -float("inf"), 2.0],
        "backend": backend.name,
        "temperature": torch.ones(3, **on),
        "top_k": torch.full((3,), 8, **on),
        "top_p": torch.full((3,), 0.9, **on),
        "min_p": torch.zeros(3, **on),
        "do_sample": True,
        "seed": torch.arange(3, **on),
        "stream": torch.arange(3, **on),
        "step": torch.arange(3, **on),
        "return_term_logprobs": True,
        "return_pushes": False,
    }
    op = torch.ops.crossfade.blend_sample if sample else torch.ops.crossfade.blend
    call |= changes
    return tuple(call[argument.name] for argument in op.default._schema.arguments)


CHANGES: list[dict[str, Any]] = [
    {},
    {"support": None, "mask": None, "do_sample": False, "return_term_logprobs": False},
    {
        "values": [],
        "value_weights": torch.empty(0),
        "power": 1.0,
        "weights": torch.tensor([1.0, 0]),
        "part_weights": torch.empty(0),
        "parts": [],
    },
    {"part_weights": torch.empty(0), "parts": [], "return_pushes": True},
]


@pytest.mark.parametrize("changes", CHANGES, ids=["all", "greedy", "mixture", "pushes"])
@pytest.mark.parametrize("sample", [False, True], ids=["blend", "blend_sample"])
def test_registration(backend: Backend, sample: bool, changes: dict[str, Any]) -> None:
    """Schema, fake tensors, autograd's registration and dispatch under dynamic shapes.

    No row is bad: opcheck takes equal NaNs for different.
    """
    changes = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in changes.items()}
    op = torch.ops.crossfade.blend_sample if sample else torch.ops.crossfade.blend
    torch.library.opcheck(op.default, schema_args(backend, sample, **changes))


@pytest.mark.parametrize("rows", [0, 3])
def test_shapes_without_data(rows: int) -> None:
    """Fake tensors have the shapes and dtypes that real ones would."""
    with torch._subclasses.FakeTensorMode():
        z = [torch.empty(rows, 20, dtype=torch.bfloat16) for _ in range(3)]
        settings = 0.0, None, None, 17, torch.empty(0), []
        args = z, torch.empty(3), [], torch.empty(0), *settings, None
        log_p = torch.ops.crossfade.blend(*args)
    assert (log_p.shape, log_p.dtype) == ((rows, 17), torch.float32)


def test_support_survives_the_schema(backend: Backend) -> None:
    """The schema has only floats for a support."""
    z = normal(2, 20, 1, device=backend.device)

    def cut(z: Tensor) -> Tensor:
        return backend.blend([z], [1.0], support=Support(0, 2**24 + 1, 0.9, 0.02))

    torch.testing.assert_close(compiled(cut, "eager")(z), cut(z))


@pytest.mark.parametrize("graph", GRAPHS)
def test_gradients_are_refused_backward(backend: Backend, graph: str) -> None:
    """A graph may hold the op. Only a backward pass that reaches it raises."""
    z = normal(2, 20, 1, device=backend.device).requires_grad_()

    def both(z: Tensor) -> tuple[Tensor, BlendSample]:
        name = backend.name
        return (
            ops.blend([z], [1.0], backend=name),
            ops.blend_sample([z], [1.0], seed=0, step=0, backend=name),
        )

    log_p, drawn = compiled(both, graph)(z)
    torch.testing.assert_close(log_p, both(z.detach())[0])
    assert not drawn.tokens.requires_grad
    for x in (log_p, drawn.logprobs):
        with pytest.raises(NotImplementedError, match="has no derivative"):
            (x.sum() + z.sum()).backward(retain_graph=True)
