"""Which texts share a forward."""

from __future__ import annotations

from crossfade.decoding.engine.batching import Cost, batches
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9))), st.data())
def test_a_batch_costs_no_more_than_it_may(
    each: list[tuple[int, int]], data: st.DataObject
) -> None:
    costs = [
        Cost([x[k] for x in each], data.draw(st.integers(0, 40), label="most")) for k in range(2)
    ]
    found = list(batches(*costs))
    assert sorted(i for batch in found for i in batch) == list(range(len(each)))
    for batch in found:
        assert batch == sorted(batch)
        padded = [len(batch) * max(cost.each[i] for i in batch) for cost in costs]
        assert len(batch) == 1 or all(x <= c.most for x, c in zip(padded, costs, strict=True))
    shortest = [min(costs[0].each[i] for i in batch) for batch in found]
    longest = [max(costs[0].each[i] for i in batch) for batch in found]
    assert all(a >= b for a, b in zip(shortest, longest[1:], strict=False)), "longest first"


def test_a_batch_is_as_large_as_it_may_be() -> None:
    lengths = [3, 8, 3, 4, 3]
    assert list(batches(Cost(lengths, 12))) == [[1], [0, 2, 3], [4]]
    assert list(batches(Cost(lengths, 100))) == [[0, 1, 2, 3, 4]]
    assert list(batches(Cost(lengths, 100), Cost([1] * 5, 2))) == [[1, 3], [0, 2], [4]]
