"""The calls of clients that are under way: what they cost, whose they are, and how they end."""

from __future__ import annotations

import threading
import uuid

from .contract import Request, Scoring
from .errors import APIError, busy
from .limits import Limits


class Call:
    """What one call of a client has asked the session for, which ends with the call.

    Attributes:
        id: the id of the answer.
        owner: whose call it is.
        cost: rows times terms.
        requests: the texts that are written, in the order of their numbers.
    """

    def __init__(self, calls: Calls, id: str, owner: str, cost: int) -> None:
        self.id, self.owner, self.cost = id, owner, cost
        self.requests: list[Request] = []
        self._scorings: list[Scoring] = []
        self._calls = calls
        self._lock = threading.Lock()
        self._closed = False

    def add(self, request: Request) -> None:
        """Take in a text, from any thread. If the call is over, the text is cancelled at once."""
        with self._lock:
            self.requests.append(request)
            closed = self._closed
        if closed:
            request.cancel()

    def add_scoring(self, scoring: Scoring) -> None:
        """Take in a prompt that is scored, as `add` does a text."""
        with self._lock:
            self._scorings.append(scoring)
            closed = self._closed
        if closed:
            scoring.cancel()

    def cancel(self) -> None:
        """Let its texts end where they are."""
        with self._lock:
            requests, scorings = [*self.requests], [*self._scorings]
        for request in requests:
            if not request.done:  # else the session's thread would wake for nothing
                request.cancel()
        for scoring in scorings:
            scoring.cancel()

    def close(self) -> None:
        """End the call: whatever of it is still under way is cancelled. Once is enough."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._calls.remove(self)
        self.cancel()


class Calls:
    """All calls that are under way, by their ids.

    Args:
        limits: what all of them may cost together.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.load = 0
        self._calls: dict[str, Call] = {}
        self._lock = threading.Lock()

    def open(self, prefix: str, owner: str, cost: int) -> Call:
        """Begin a call, whose `close` must follow.

        Raises:
            APIError: with those under way it would cost more than the server allows.
        """
        call = Call(self, f"{prefix}-{uuid.uuid4().hex}", owner, cost)
        with self._lock:
            if self.load + cost > self.limits.load:
                raise busy(
                    f"this request costs {cost} rows times terms, and {self.load} of "
                    f"{self.limits.load} are taken; try again",
                    "overloaded",
                )
            self.load += cost
            self._calls[call.id] = call
        return call

    def remove(self, call: Call) -> None:
        with self._lock:
            del self._calls[call.id]
            self.load -= call.cost

    def find(self, id: str, owner: str) -> Call:
        """The call of that id, if it is under way and this owner's.

        Raises:
            APIError: it is not. Those of others look like those that never were.
        """
        with self._lock:
            call = self._calls.get(id)
        if call is None or call.owner != owner or all(r.done for r in call.requests):
            raise APIError(404, f"no request {id} of this key is under way", code="not_found")
        return call
