"""Formulas: blends written as text, as the command line takes them and as blends print."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import numbers
import operator
import re
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import presets
from .blends.algebra import Algebra
from .blends.blend import Blend, Model, ValueHead, as_term
from .blends.classifier import Classifier
from .blends.power_mean import intersection, power_mean, union
from .blends.weights import Weight, check_weight
from .checks import did_you_mean
from .ops.types import Support

# Up to Python 3.12 threads that make trees at the same time count each other's depth, and fail:
# "AST constructor recursion depth mismatch".
_PARSING = threading.RLock()
CUTS = {f.name for f in fields(Support)}
LONGEST = 4096  # characters a formula may have; far more would exhaust the stack of the parser
FORMS = "only names, numbers, + - * / and parentheses can stand"
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "power_mean": power_mean,
    "union": union,
    "intersection": intersection,
    **{name: getattr(presets, name) for name in presets.__all__ if name not in presets.RECIPES},
}


def _divided(a: Any, b: Any) -> Any:
    """``a / b``. A blend may be divided by a fader that has a number for each request."""
    if not isinstance(b, Tensor):
        return a / b
    if not b.all():
        raise ZeroDivisionError("division by zero")
    return a * (1.0 / b)


OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divided,
}


def evaluate(formula: str, names: Mapping[str, Any]) -> Any:
    """The value of a formula of numbers, names, ``+ - * /``, parentheses and presets.

    The presets of `crossfade.presets` that give blends, `power_mean`, `union` and `intersection`
    are called as in Python: ``cfg(base, 1.5, negative_system="Be rude.")``. Unless it is one of the
    names, ``inf`` is a number, for `power_mean` alone. Blends print two more forms, which are read
    too: ``(a - b).clamp(min=-2, max=2)``, and ``(a + b).within(Support(term=0, top_k=5))``, where
    `term` counts the terms in the order in which the text before it names them.

    Python's parser makes a tree of the text, and only nodes of these forms are evaluated. There
    are no other calls, no other attributes and no indexing, so that a formula from a command line
    or a file is safe to read.

    Args:
        formula: the text.
        names: what each name stands for: a model, a blend, a number or a tensor ``[requests]``.

    Raises:
        TypeError: `formula` is no text.
        ValueError: the formula has another form or an unknown name; shows the place.
    """
    if not isinstance(formula, str):
        raise TypeError(f"formula is a {type(formula).__name__}; it must be a str")
    if len(formula) > LONGEST:
        raise ValueError(f"formula has {len(formula)} characters; it must have at most {LONGEST}")
    text = _one_line(formula)
    # Python's parser brings identifiers into this form of Unicode, so the names must be in it too.
    names = {unicodedata.normalize("NFKC", name): x for name, x in names.items()}

    def fail(column: int, problem: str) -> NoReturn:
        raise ValueError(
            f"formula: {problem} at column {column + 1}\n  {text}\n  {' ' * column}^"
        ) from None

    def column(node: ast.expr) -> int:
        return len(text.encode()[: node.col_offset].decode())  # The parser counts bytes.

    def apply(node: ast.expr, function: Callable[..., Any], *operands: Any, **options: Any) -> Any:
        try:
            found = function(*operands, **options)
        except (TypeError, ValueError, ArithmeticError, NotImplementedError) as e:
            fail(column(node), str(e))
        if isinstance(found, Tensor) and not found.isfinite().all():
            fail(column(node), "a weight is not finite")
        return found

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() as x) if not isinstance(x, bool):
                return apply(node, float, x)
            case ast.Name(id="inf") if "inf" not in names:
                return math.inf
            case ast.Name(id=name):
                if name not in names:
                    known = f"(known: {', '.join(sorted(names)) or 'none'})"
                    meant = did_you_mean(name, names)
                    fail(column(node), f"unknown name {name!r} {known}{meant}")
                return names[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return apply(operand, operator.neg, value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return apply(right, OPERATORS[type(op)], value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=given, keywords=options):
                function = _function(name, lambda problem: fail(column(node), problem))
                each = [argument(x) for x in given]
                named = {str(k.arg): argument(k.value) for k in options if k.arg is not None}
                if len(named) == len(options):  # and none is written as **options
                    return apply(node, _call, name, function, each, named)
            case ast.Call(
                func=ast.Attribute(value=inner, attr="within"),
                args=[ast.Call(func=ast.Name(id="Support"), args=[], keywords=options)],
                keywords=[],
            ) if all(k.arg in CUTS and isinstance(k.value, ast.Constant) for k in options):
                cuts = {str(k.arg): ast.literal_eval(k.value) for k in options}
                return apply(node, _within, value(inner), _named(inner, names), cuts)
            case ast.Call(
                func=ast.Attribute(value=inner, attr="clamp"), args=given, keywords=options
            ):
                each = [value(x) for x in given]
                named = {str(k.arg): value(k.value) for k in options}
                return apply(node, _clamp, value(inner), *each, **named)
            case ast.Call(func=ast.Constant() | ast.BinOp()):
                fail(column(node), "a product has a *, as in 0.5 * (a - b), which is missing")
        fail(column(node), FORMS)

    def argument(node: ast.expr) -> Any:
        """What a preset is given: a value, a whole number, a text, or a list of values."""
        match node:
            case ast.List(elts=each):
                return [value(x) for x in each]
            case ast.Constant(value=int() | str() as x) if not isinstance(x, bool):
                return x
        return value(node)

    if "\0" in text:  # Older versions of Python raise no SyntaxError for it.
        fail(text.index("\0"), FORMS)
    try:
        tree = _tree(text)
        comment = _comment(text, tree)
        if comment is not None:  # Python would skip it.
            fail(comment, FORMS)
        return value(tree.body)
    except SyntaxError as e:
        end = len(text)  # An error without a place says that the text ends too early.
        fail(min(e.offset - 1, end) if e.offset else end, e.msg)
    except (RecursionError, MemoryError):
        fail(0, "it is nested too deeply")


@functools.lru_cache(maxsize=256)
def _tree(text: str) -> ast.Expression:
    """What a text of one line says, as Python's parser reads it. Nobody may change it.

    Raises:
        SyntaxError, RecursionError, MemoryError: as of the parser.
    """
    with _PARSING:
        return ast.parse(text, mode="eval")


def _one_line(formula: str) -> str:
    """A formula of several lines as one. Spaces stay, since texts in it may have them."""
    return re.sub(r"\s", " ", formula).strip()


def _comment(text: str, tree: ast.AST) -> int | None:
    """The place of the first # outside the texts of a formula, of which `tree` was made."""
    whole = text.encode()  # The parser counts bytes.
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    for found in re.finditer(b"#", whole):
        at = found.start()
        if not any(n.col_offset <= at < (n.end_col_offset or 0) for n in texts):
            return len(whole[:at].decode())
    return None


def names_in(formula: str) -> set[str]:
    """The names that a formula which can be read has, without those of its presets."""
    tree = _tree(_one_line(formula))
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called}


def calls_in(formula: str) -> int:
    """How often a formula which can be read calls a preset, any of which may add a term."""
    tree = _tree(_one_line(formula))
    return sum(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id != "Support"
        for node in ast.walk(tree)
    )


def _function(name: str, fail: Callable[[str], NoReturn]) -> Callable[..., Any]:
    if name in presets.RECIPES:
        fail(
            f"{name} is a blend and a search; write {presets.RECIPES[name]}, and search by the "
            "value"
        )
    if name not in FUNCTIONS:
        meant = did_you_mean(name, FUNCTIONS)
        fail(f"unknown function {name!r} (known: {', '.join(FUNCTIONS)}){meant}")
    return FUNCTIONS[name]


def _call(
    name: str, function: Callable[..., Any], given: Sequence[Any], options: Mapping[str, Any]
) -> Any:
    """The blend of a preset. A wrong number of arguments, or a wrong name, says what there are."""
    signature = inspect.signature(function)
    try:
        signature.bind(*given, **options)
    except TypeError as error:
        unknown = next((x for x in options if x not in signature.parameters), None)
        meant = "" if unknown is None else did_you_mean(unknown, signature.parameters)
        plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        form = str(signature.replace(parameters=plain, return_annotation=signature.empty))
        raise TypeError(f"{error}; it must be {name}{form}{meant}") from None
    return function(*given, **options)


def _clamp(x: Any, *bounds: Any, **named: Any) -> Blend:
    if not isinstance(x, Algebra):
        raise TypeError(f"{x} is no blend; only a blend can be clamped")
    return x.clamp(*bounds, **named)


def _named(node: ast.AST, names: Mapping[str, Any]) -> list[Model]:
    """The terms that a part of a formula names, in the order of the text."""
    if isinstance(node, ast.Name):
        x = names.get(node.id)
        return list(x._blend().terms) if isinstance(x, Algebra) else []
    by_name = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    called = node.func if by_name else None  # type: ignore[attr-defined]
    inside = (child for child in ast.iter_child_nodes(node) if child is not called)
    return [t for child in inside for t in _named(child, names)]


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
    """The blend that a formula means: ``parse("base + w * (tuned - ref)", base=..., w=0.8)``.

    A formula has names, numbers, ``+ - * /``, parentheses, and presets such as ``cfg(base, 1.5,
    negative_system="Be rude.")``. It is never run as Python code. What a blend prints is a formula
    that reads back as the same blend, if its weights are numbers.

    Args:
        formula: the text.
        models: what the names stand for: bare Hugging Face models, `Model`, `ValueHead`,
            `Classifier` or `Blend`. A model, head or classifier takes its name in the formula as
            its own. Not all need be used. A number or a tensor ``[requests]`` is a fader, which
            must be used.

    Raises:
        TypeError: one of `models` is none of these.
        ValueError: the formula cannot be read; shows the place and what is wrong there. A fader is
            not finite, is not in the formula, or has the name of a term.
    """
    names: dict[str, Any] = {}
    faders: dict[str, Weight] = {}
    for name, x in models.items():
        if isinstance(x, numbers.Real) or hasattr(x, "tolist"):  # A tensor or an array has that.
            faders[name] = names[name] = check_fader(name, x)
        elif isinstance(x, Blend):
            names[name] = x
        else:
            x = x if isinstance(x, (ValueHead, Classifier)) else as_term(name, x, Model)
            names[name] = x if x.name == name else replace(x, name=name)
    lengths = {len(w): name for name, w in faders.items() if isinstance(w, Tensor)}
    if len(lengths) > 1:
        each = " and ".join(f"{name} [{length}]" for length, name in lengths.items())
        raise ValueError(f"faders are {each}; they must have one length, one number a request")
    blend = evaluate(formula, names)
    check_faders(faders, formula)
    for x in names.values():
        for name in _term_names(x) & faders.keys():
            raise ValueError(f"the fader {name} has the name of a term of {x}; it must differ")
    if not isinstance(blend, Algebra):
        raise ValueError(f"formula is {formula!r}, a number; it must have at least one model")
    return blend._blend()


def check_fader(name: str, x: Any) -> Weight:
    """A fader's position as a weight: a finite number, or a tensor of such ``[requests]``."""
    w = check_weight(name, x)
    if isinstance(w, Tensor) and not torch.isfinite(w).all():
        raise ValueError(f"{name} has a number that is not finite")
    return w


def check_faders(faders: Mapping[str, Any], *formulas: str) -> None:
    """Raise a ValueError if a fader is in none of these formulas, which can be read."""
    used: set[str] = set().union(*map(names_in, formulas))
    for name in faders:
        if unicodedata.normalize("NFKC", name) not in used:
            where = " and ".join(map(repr, formulas))
            raise ValueError(f"the fader {name} is not in {where}{did_you_mean(name, used)}")


def _term_names(x: Any) -> set[str]:
    return {*x.names, *x.value_names, *x.classifier_names} if isinstance(x, Blend) else set()
