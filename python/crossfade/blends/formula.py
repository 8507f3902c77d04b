"""Formulas: blends written as text, as the command line takes them and as blends print."""

from __future__ import annotations

import ast
import operator
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

from ..ops.types import Support
from .algebra import Algebra
from .blend import Blend, Model, ValueHead, as_term, power_mean

CUTS = {f.name for f in fields(Support)}
LONGEST = 4096  # characters a formula may have; far more would exhaust the stack of the parser
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(formula: str, names: Mapping[str, Any]) -> Any:
    """The value of a formula of numbers, names, ``+ - * /`` and parentheses.

    Blends print two more forms, which are read too: ``power_mean([a, b], weights=[0.5, 0.5],
    r=1)`` and ``(a + b).within(Support(term=0, top_k=5))``, where `term` counts the terms in the
    order in which the text before it names them.

    Python's parser makes a tree of the text, and only nodes of these forms are evaluated. There
    are no other calls, no attributes and no indexing, so that a formula from a command line or a
    file is safe to read.

    Args:
        formula: the text.
        names: what each name stands for.

    Raises:
        TypeError: `formula` is no text.
        ValueError: the formula has another form or an unknown name; shows the place.
    """
    if not isinstance(formula, str):
        raise TypeError(f"formula is a {type(formula).__name__}; it must be a str")
    if len(formula) > LONGEST:
        raise ValueError(f"formula has {len(formula)} characters; it must have at most {LONGEST}")
    text = " ".join(formula.split())
    # Python's parser brings identifiers into this form of Unicode, so the names must be in it too.
    names = {unicodedata.normalize("NFKC", name): x for name, x in names.items()}

    def fail(column: int, problem: str) -> NoReturn:
        raise ValueError(
            f"formula: {problem} at column {column + 1}\n  {text}\n  {' ' * column}^"
        ) from None

    def column(node: ast.expr) -> int:
        return len(text.encode()[: node.col_offset].decode())  # The parser counts bytes.

    def apply(node: ast.expr, function: Callable[..., Any], *operands: Any) -> Any:
        try:
            return function(*operands)
        except (TypeError, ValueError, ArithmeticError) as e:
            fail(column(node), str(e))

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() as x) if not isinstance(x, bool):
                return apply(node, float, x)
            case ast.Name(id=name):
                if name not in names:
                    fail(
                        column(node),
                        f"unknown name {name!r} (known: {', '.join(sorted(names)) or 'none'})",
                    )
                return names[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return apply(operand, operator.neg, value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return apply(right, OPERATORS[type(op)], value(left), value(right))
            case ast.Call(
                func=ast.Name(id="power_mean"), args=[ast.List(elts=models)], keywords=options
            ):
                given = {k.arg: k.value for k in options}
                match given:
                    case {"weights": ast.List(elts=weights), "r": r} if len(given) == 2:
                        each = [value(x) for x in models], [value(w) for w in weights]
                        return apply(node, power_mean, *each, value(r))
            case ast.Call(
                func=ast.Attribute(value=inner, attr="within"),
                args=[ast.Call(func=ast.Name(id="Support"), args=[], keywords=options)],
                keywords=[],
            ) if all(k.arg in CUTS and isinstance(k.value, ast.Constant) for k in options):
                cuts = {str(k.arg): ast.literal_eval(k.value) for k in options}
                return apply(node, _within, value(inner), _named(inner, names), cuts)
        fail(column(node), "only names, numbers, + - * / and parentheses can stand")

    # Python would skip a comment, and its older versions raise no SyntaxError for a zero byte.
    for character in "#\0":
        if character in text:
            fail(text.index(character), "only names, numbers, + - * / and parentheses can stand")
    try:
        return value(ast.parse(text, mode="eval").body)
    except SyntaxError as e:
        end = len(text)  # An error without a place says that the text ends too early.
        fail(min(e.offset - 1, end) if e.offset else end, e.msg)
    except (RecursionError, MemoryError):
        fail(0, "it is nested too deeply")


def _named(node: ast.AST, names: Mapping[str, Any]) -> list[Model]:
    """The terms that a part of a formula names, in the order of the text."""
    if isinstance(node, ast.Name):
        x = names.get(node.id)
        return list(x._blend().terms) if isinstance(x, Algebra) else []
    return [t for child in ast.iter_child_nodes(node) for t in _named(child, names)]


def _within(x: Any, named: Sequence[Model], cuts: Mapping[str, Any]) -> Blend:
    """``x.within(Support(**cuts))``, whose `term` counts the terms that the text names.

    Among them may be one of weight 0, which the blend has left out; it is put back for the support.
    """
    if not isinstance(x, Algebra):
        raise TypeError(f"{x} is no blend; only a blend can be within a support")
    blend = x._blend()
    if blend.support is not None:
        raise ValueError(f"{blend} is within a support already, and one set is all it can have")
    own = dict(zip(blend.terms, blend.weights, strict=True))
    terms = tuple(dict.fromkeys([*blend.terms[:1], *named]))
    return replace(
        blend,
        terms=terms,
        weights=tuple(own.get(t, 0.0) for t in terms),
        support=Support(**cuts),
    )


def parse(formula: str, /, **models: Any) -> Blend:
    """The blend that a formula means: ``parse("base + 0.8 * (tuned - ref)", base=..., ...)``.

    A formula has names, numbers, ``+ - * /`` and parentheses. It is never run as Python code. What
    a blend prints is a formula that reads back as the same blend, if its weights are numbers.

    Args:
        formula: the text.
        models: what the names stand for: bare Hugging Face models, `Model`, `ValueHead` or `Blend`.
            A model or head takes its name in the formula as its own. Not all need be used.

    Raises:
        TypeError: one of `models` is none of these.
        ValueError: the formula cannot be read; shows the place and what is wrong there.
    """
    names: dict[str, Any] = {}
    for name, x in models.items():
        if not isinstance(x, Blend):
            x = x if isinstance(x, ValueHead) else as_term(name, x, Model)
            x = replace(x, name=name)
        names[name] = x
    blend = evaluate(formula, names)
    if not isinstance(blend, Algebra):
        raise ValueError(f"formula is {formula!r}, a number; it must have at least one model")
    return blend._blend()
