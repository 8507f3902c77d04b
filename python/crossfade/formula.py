"""Formulas: the command line's spelling of a blend."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from .algebra import Algebra
from .blend import Blend, Model, ValueHead, as_term

LONGEST = 4096  # characters of a formula that is read: far below what exhausts a parser's stack
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(formula: str, names: Mapping[str, Any]) -> Any:
    """The value of a formula of numbers, `names`, ``+ - * /`` and parentheses; nothing else.

    Python's parser reads it, and only those nodes are evaluated: no calls, attributes or indexing,
    so that a formula from a command line or a file is safe to read.

    Raises:
        ValueError: shows the place, and for a name that is not there those that are.
    """
    if not isinstance(formula, str):
        raise TypeError(f"formula is a {type(formula).__name__}; it must be a str")
    if len(formula) > LONGEST:
        raise ValueError(f"formula has {len(formula)} characters; it must have at most {LONGEST}")
    text = " ".join(formula.split())

    def fail(column: int, problem: str) -> NoReturn:
        raise ValueError(
            f"formula: {problem} at column {column + 1}\n  {text}\n  {' ' * column}^"
        ) from None

    def column(node: ast.expr) -> int:
        return len(text.encode()[: node.col_offset].decode())  # ast counts bytes

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
        fail(column(node), "only names, numbers, + - * / and parentheses can stand")

    for character in "#\0":  # a comment, and what older Pythons do not call a SyntaxError
        if character in text:
            fail(text.index(character), "only names, numbers, + - * / and parentheses can stand")
    try:
        return value(ast.parse(text, mode="eval").body)
    except SyntaxError as e:
        end = len(text)  # where something is missing, if the error has no place
        fail(min(e.offset - 1, end) if e.offset else end, e.msg)
    except (RecursionError, MemoryError):
        fail(0, "it is nested too deeply")


def parse(formula: str, /, **models: Any) -> Blend:
    """The blend that a formula says: ``parse("base + 0.8 * (tuned - ref)", base=..., ...)``.

    A formula has names, numbers, ``+ - * /`` and parentheses; it is never run as Python code. What
    a blend of numbers prints reads back as that blend.

    Args:
        formula: the text.
        models: what the names stand for: bare Hugging Face models, `Model`, `ValueHead` or `Blend`;
            the first three are called by these names from then on. Not all need be used.

    Raises:
        TypeError: a member of `models` is none of these.
        ValueError: shows the place in the formula and what is wrong there.
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
