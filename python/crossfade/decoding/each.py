"""Lists of settings, with an entry for each request."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.stopping_criteria import StopStringCriteria

from ..ops import check
from .inputs import Requests
from .job import Criteria
from .settings import LARGEST, SAMPLING, check_int, check_stop_strings

# Transformers keeps what it knows of some stop strings in a place that all threads share, and from
# which one may take what another has just found there.
STOPS = threading.RLock()


@dataclass(frozen=True)
class Each:
    """Settings of which the caller gives each request its own.

    Attributes:
        table: lists with a value for each request, by the names of `SAMPLING` and ``limit``.
        stop_strings: those of each request. None: all requests have the same, which are not here.
    """

    table: dict[str, list[Any]] = field(default_factory=dict)
    stop_strings: list[tuple[str, ...]] | None = None

    def part(self, requests: Requests) -> Each:
        """The settings of some of the requests."""
        table = {name: list(requests.part_of(x)) for name, x in self.table.items()}
        stops = self.stop_strings
        return Each(table, None if stops is None else list(requests.part_of(stops)))

    def check(self, requests: int) -> None:
        """Refuse lists that do not have one entry a request.

        Raises:
            ValueError: names the argument.
        """
        for name, given in (*self.table.items(), ("stop_strings", self.stop_strings)):
            if given is not None and len(given) != requests:
                name = "max_new_tokens" if name == "limit" else name
                raise ValueError(
                    f"{name} has {len(given)} entries; it must have {requests}, one a request"
                )

    def criteria(self, tokenizer: Any) -> list[Criteria]:
        """The criteria that end rows by the stop strings of their own requests."""
        several: dict[tuple[str, ...], list[int]] = {}
        for request, texts in enumerate(self.stop_strings or ()):
            if texts:
                several.setdefault(texts, []).append(request)
        return [
            Criteria(stop_criterion(list(texts), tokenizer), frozenset(requests))
            for texts, requests in several.items()
        ]


def take_each(arguments: dict[str, Any]) -> Each:
    """Take lists with an entry a request out of the arguments of `generate`.

    In their place, Hugging Face's config gets the longest limit, and the stop strings of all.

    Raises:
        TypeError, ValueError: names the entry, what it was and what it must be.
    """
    table: dict[str, list[Any]] = {}
    for name in SAMPLING:
        if isinstance(arguments.get(name), (list, tuple)):
            given = list(arguments.pop(name))
            table[name] = [_setting(name, i, x) for i, x in enumerate(given)]
    if isinstance(arguments.get("max_new_tokens"), (list, tuple)):
        given = list(arguments["max_new_tokens"])
        for i, x in enumerate(given):
            if x is None:
                raise TypeError(f"max_new_tokens[{i}] is None; it must be an int")
            check_int(f"max_new_tokens[{i}]", x, 1, LARGEST)
        if not given:
            raise ValueError("max_new_tokens is empty; it must have one entry a request")
        table["limit"], arguments["max_new_tokens"] = given, max(given)
    stops: list[tuple[str, ...]] | None = None
    texts = arguments.get("stop_strings")
    if isinstance(texts, (list, tuple)) and any(
        x is None or isinstance(x, (list, tuple)) for x in texts
    ):
        stops = []
        for x in texts:
            own = () if x is None else tuple(x) if isinstance(x, (list, tuple)) else (x,)
            check_stop_strings(own)
            stops.append(own)
        arguments["stop_strings"] = sorted({text for each in stops for text in each}) or None
    return Each(table, stops)


def _setting(name: str, i: int, value: Any) -> Any:
    """The setting of request `i`, checked; errors name its entry."""
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{name}[{i}] is a tensor; it must be a number")
    try:
        return check.setting(name, value, 1, torch.device("cpu"))
    except (TypeError, ValueError) as error:
        said = str(error).removeprefix(name).removesuffix(" or a tensor")
        raise type(error)(f"{name}[{i}]{said}") from None


def stop_criterion(texts: list[str], tokenizer: Any) -> StopStringCriteria:
    """A criterion that ends rows which have written one of these texts.

    Raises:
        ValueError: Transformers cannot tell what the tokens of this tokenizer add to a text.
    """
    try:
        with STOPS:
            return StopStringCriteria(tokenizer, texts)
    except ValueError as error:  # It tells tokenizers apart by how they write the letters a to f.
        raise ValueError(
            f"stop_strings={texts!r}: Transformers cannot tell what the tokens of this "
            f"{type(tokenizer).__name__} add to a text ({error}); give eos_token_id or "
            "stopping_criteria"
        ) from error
