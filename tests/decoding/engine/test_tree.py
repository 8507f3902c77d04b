"""The tree of what texts share: no token is read twice that need not be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crossfade.decoding.engine.tree import Node, tree
from hypothesis import given
from hypothesis import strategies as st

Text = tuple[list[int], ...]

TOKENS = st.lists(st.integers(0, 1), max_size=7)


def texts_of(models: int) -> Any:
    return st.lists(st.tuples(*[TOKENS] * models), max_size=9).map(sorted)


def least(texts: Sequence[Text], held: Sequence[Text] = ()) -> int:
    """The tokens that each model must read, if it reads each beginning once."""
    found = 0
    for ids in zip(*texts, strict=True):
        begun = {tuple(x[:n]) for x in ids for n in range(1, len(x) + 1)}
        found += len(begun)
    for ids, known in zip(zip(*texts, strict=True), zip(*held, strict=True), strict=False):
        begun = {tuple(x[:n]) for x in ids for n in range(1, len(x) + 1)}
        found -= len(begun & {tuple(x[:n]) for x in known for n in range(1, len(x) + 1)})
    return found


def run(nodes: Sequence[Node], texts: Sequence[Text], held: Sequence[Any]) -> None:
    """Read the nodes in order, and see that each finds before it what it goes on from."""
    known = [
        [x[:n] for x, n in zip(text, lengths, strict=True)]
        for text, lengths in zip(texts, held, strict=True)
    ]
    for node in nodes:
        first = node.texts[0]
        for k, (start, end) in enumerate(zip(node.start, node.end, strict=True)):
            assert len(known[first][k]) >= start
            beginning = texts[first][k][:end]
            for i in node.texts:
                assert texts[i][k][:end] == beginning
                known[i][k] = max(known[i][k], beginning, key=len)
    assert [tuple(x) for x in known] == [*map(tuple, texts)]
    leaves = [n.texts for n in nodes if len(n.texts) == 1]
    assert leaves == [range(i, i + 1) for i in range(len(texts))]


def common(text: Text, held: Sequence[Text]) -> tuple[int, ...]:
    """How much of a text some earlier text begins with."""
    each = [
        tuple(max(n for n in range(8) if a[:n] == b[:n]) for a, b in zip(text, other, strict=True))
        for other in [*held, tuple([] for _ in text)]
    ]
    return max(each, key=sum, default=(0,) * len(text))


@given(texts_of(1))
def test_what_several_texts_begin_with_is_read_once(texts: list[Text]) -> None:
    held = [(0,)] * len(texts)
    nodes = tree(texts, held, 1)
    run(nodes, texts, held)
    assert sum(n.tokens for n in nodes) == least(texts)


@given(texts_of(1), texts_of(1))
def test_what_is_held_is_not_read(texts: list[Text], before: list[Text]) -> None:
    held = [common(text, before) for text in texts]
    nodes = tree(texts, held, 1)
    run(nodes, texts, held)
    assert sum(n.tokens for n in nodes) == least(texts, before)


@given(st.integers(1, 3).flatmap(texts_of), st.integers(2, 9))
def test_nodes_that_save_little_are_left_out(texts: list[Text], worth: int) -> None:
    models = len(texts[0]) if texts else 1
    held = [(0,) * models] * len(texts)
    whole, few = tree(texts, held, 0), tree(texts, held, worth)
    run(few, texts, held)
    inner = {n.texts for n in few if len(n.texts) > 1}
    left_out = sum(len(n.texts) > 1 and n.texts not in inner for n in whole)
    most, tokens = sum(n.tokens for n in whole), sum(n.tokens for n in few)
    assert most <= tokens <= most + left_out * worth * models
    assert (tokens - most < left_out * worth * models) == (left_out > 0)
    assert inner <= {n.texts for n in whole}


def test_a_node_is_worth_what_its_texts_save() -> None:
    texts: list[Text] = [([1, 2, 3, 4, i],) for i in range(3)]
    held = [(0,)] * 3
    assert [n.tokens for n in tree(texts, held, 8)] == [4, 1, 1, 1]
    assert [n.tokens for n in tree(texts, held, 8.5)] == [5, 5, 5]
    assert [n.tokens for n in tree(texts, [(1,)] * 3, 8)] == [4, 4, 4]


def test_levels_are_nodes_around() -> None:
    """As the nodes of one level are read together, each after those around it."""
    texts: list[Text] = [([1] * 9 + [a] * 9 + [b],) for a in (2, 3) for b in (4, 5)]
    found = [(n.texts, n.level) for n in tree(texts, [(0,)] * 4, 1)]
    leaves = [(range(i, i + 1), 2) for i in range(4)]
    assert found == [(range(4), 0), (range(2), 1), *leaves[:2], (range(2, 4), 1), *leaves[2:]]
    assert tree([], [], 1) == []


def test_any_number_of_beginnings_may_lie_within_each_other() -> None:
    """As where all beginnings of one text are scored."""
    texts = [(list(range(n)),) for n in range(1, 1502)]
    nodes = tree(texts, [(0,)] * len(texts), 0)
    assert sum(node.tokens for node in nodes) == 1501
    assert max(node.level for node in nodes) >= 1499
