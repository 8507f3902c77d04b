"""What the server asks of a session: `crossfade.Session` is one, and tests have a scripted one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Mapping
from typing import Any, Protocol


class Piece(Protocol):
    """What a request has written since its last piece."""

    text: str
    ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    term_logprobs: list[dict[str, float]]
    pushes: list[dict[str, float]]
    kl: list[float]


class Request(Protocol):
    """One text that is being written."""

    prompt_ids: list[int]
    changes: list[tuple[int, dict[str, float]]]

    @property
    def done(self) -> bool: ...
    @property
    def reason(self) -> str | None: ...
    def __aiter__(self) -> AsyncIterator[Piece]: ...
    def __await__(self) -> Generator[Any, None, Any]: ...
    def cancel(self) -> None: ...
    def weights(self, **faders: float) -> None: ...


class Session(Protocol):
    """A thread that owns the models, and what is asked of it from any other thread."""

    blend: str
    tokenizer: Any

    @property
    def terms(self) -> tuple[str, ...]: ...
    @property
    def values(self) -> tuple[str, ...]: ...
    @property
    def weights(self) -> Mapping[str, float]: ...
    @property
    def alive(self) -> bool: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...

    def submit(self, inputs: Any, **options: Any) -> Request: ...
    def score(
        self,
        inputs: Any,
        responses: Any,
        *,
        blend: str | None = None,
        weights: Mapping[str, float] | None = None,
        timeout: float | None = None,
        **arguments: Any,
    ) -> Any: ...
    def stats(self) -> Any: ...
    def close(self, *, drain: bool = True, timeout: float | None = None) -> None: ...
