"""How requests and sessions end, and whose turn it is."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import crossfade as cf
import pytest
from crossfade.decoding.loop import Loop
from crossfade.decoding.session import Closed, Full
from served import PROMPT, alone, until
from tiny_models import make

pytestmark = pytest.mark.usefixtures("slow")

LONG: dict[str, Any] = {"max_new_tokens": 450, "eos_token_id": None}
SHORT: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None}


@pytest.fixture
def session() -> Iterator[cf.Session]:
    with cf.Session({"base": make()}, max_batch=1) as session:
        yield session
        session.close(drain=False)


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Loops take no step until this is set."""
    goes, advance = threading.Event(), Loop.advance

    def patient(self: Loop) -> Any:
        assert goes.wait(60)
        return advance(self)

    monkeypatch.setattr(Loop, "advance", patient)
    yield goes
    goes.set()


def test_cancel_at_any_time(session: cf.Session) -> None:
    decoding = session.submit(PROMPT, **LONG)
    waiting = session.submit(PROMPT, **LONG)
    next(iter(decoding))
    waiting.cancel()
    assert waiting.result(30).responses == [[]]
    assert waiting.reason == "cancelled"
    assert not decoding.done
    decoding.cancel()
    decoding.cancel()
    written = decoding.result(30).responses[0]
    assert decoding.reason == "cancelled"
    assert 0 < len(written) < 450
    asked = LONG | {"max_new_tokens": len(written)}
    assert written == alone({"base": cf.Model(make())}, PROMPT, **asked).responses[0]
    ended = session.submit(PROMPT, **SHORT)
    assert len(ended.result(30).responses[0]) == 3
    ended.cancel()
    session.submit(PROMPT, **SHORT).result(30)  # By now it was told of that.
    assert ended.reason == "length"
    assert session.stats().requests == {"cancelled": 2, "length": 2}


def test_cancel_while_a_prompt_is_read(
    session: cf.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt is read in pieces, and between two of them a request may leave."""
    monkeypatch.setattr("crossfade.decoding.engine.group.max_tokens", lambda device: 16)
    pieces, read = [], Loop._read

    def counted(self: Loop) -> None:
        read(self)
        pieces.append(self.reading.keys())
        if len(pieces) == 2:
            request.cancel()

    monkeypatch.setattr(Loop, "_read", counted)
    request = session.submit([7, 8] * 100, **SHORT)
    assert request.result(30).responses == [[]]
    assert request.reason == "cancelled"
    assert len(pieces) < 6, "the rest of the prompt was not read"
    assert session.submit([7, 8] * 100, **SHORT).result(30).finished.tolist() == [False]


def test_timeouts(session: cf.Session) -> None:
    slow = session.submit(PROMPT, **LONG)
    waits = session.submit(PROMPT, timeout=1e-6, **LONG)
    assert waits.result(30).responses == [[]]
    assert waits.reason == "timeout"
    slow.cancel()
    assert session.submit(PROMPT, timeout=60, **SHORT).result(30) is not None


def test_a_request_that_runs_out_of_time(
    session: cf.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = session.submit(PROMPT, timeout=3600, **LONG)
    next(iter(request))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    assert 0 < len(request.result(30).responses[0]) < 450
    assert request.reason == "timeout"
    early = session.submit(PROMPT, max_time=1800, timeout=3600, **LONG)
    assert early.asked.job.deadline < now + 7200 + 1900, "the first of two deadlines counts"
    early.cancel()


def test_whose_turn_it_is(paused: threading.Event) -> None:
    """Higher priorities first; of these, scopes that have fewest; of these, who came first."""
    begun: list[str] = []
    paused.set()
    with cf.Session({"base": make()}, max_batch=2) as session:
        first = [session.submit(PROMPT, scope="a", **LONG) for _ in range(2)]
        until(lambda: session.running == 2)
        paused.clear()
        names, join = dict[int, str](), session._worker.waiting.remove

        def remembered(request: cf.Request) -> bool:
            if request.id in names:
                begun.append(names[request.id])
            return join(request)

        session._worker.waiting.remove = remembered  # type: ignore[method-assign]
        each = []
        for name in ("a1", "a2", "b1", "b2", "last a"):
            urgent = int(name == "last a")
            each.append(
                session.submit(PROMPT, scope="b" if "b" in name else "a", priority=urgent, **SHORT)
            )
            names[each[-1].id] = name
        for r in first:
            r.cancel()
        paused.set()
        for r in each:
            r.result(30)
    assert begun == ["last a", "b1", "a1", "b2", "a2"]


def test_full(paused: threading.Event) -> None:
    with cf.Session({"base": make()}, max_batch=2, max_waiting=1) as session:
        each = [session.submit(PROMPT, **SHORT) for _ in range(3)]
        with pytest.raises(Full, match="1 requests wait; at most 1 may"):
            session.submit(PROMPT, **SHORT)
        paused.set()
        for r in each:
            r.result(30)
        session.submit(PROMPT, **SHORT).result(30)


@pytest.mark.parametrize("drain", [True, False])
def test_close(drain: bool) -> None:
    session = cf.Session({"base": make()}, max_batch=1)
    each = [session.submit(PROMPT, **LONG | {"max_new_tokens": 9}) for _ in range(3)]
    next(iter(each[0]))
    session.close(drain=drain)
    session.close()
    assert not session.alive
    assert not session._thread.is_alive()
    assert [r.reason for r in each] == ["length" if drain else "cancelled"] * 3
    for act in (lambda: session.submit(PROMPT), lambda: session.score(PROMPT)):
        with pytest.raises(Closed, match="the session was closed"):
            act()


def test_close_waits_no_longer_than_its_timeout(session: cf.Session) -> None:
    each = [session.submit(PROMPT, **LONG) for _ in range(50)]
    session.close(timeout=0.05)
    assert all(r.done for r in each)
    assert each[-1].reason == "cancelled"


def test_an_error_within_with_cancels() -> None:
    session = cf.Session({"base": make()})
    request = session.submit(PROMPT, **LONG)
    with pytest.raises(KeyError, match="mine"), session:
        raise KeyError("mine")
    assert request.reason == "cancelled"


class Dies(BaseException):
    pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies(paused: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    session = cf.Session({"base": make()}, max_batch=1)
    running, waiting = session.submit(PROMPT, **SHORT), session.submit(PROMPT, **SHORT)
    raised: list[BaseException] = []

    def wait(act: Any) -> threading.Thread:
        def run() -> None:
            try:
                act()
            except Closed as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    async def awaited() -> None:
        await waiting

    async def read() -> None:
        async for _ in waiting:
            pass

    threads = [
        wait(running.result),
        wait(lambda: list(running)),
        wait(lambda: asyncio.run(awaited())),
        wait(lambda: asyncio.run(read())),
        wait(lambda: session.score(PROMPT).result()),
    ]
    until(lambda: session._worker._todo)
    monkeypatch.setattr(Loop, "_seat", lambda self: (_ for _ in ()).throw(Dies("of a fault")))
    paused.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(raised) == 5
    assert all("Dies('of a fault')" in str(e) for e in raised)
    assert all(isinstance(e.__cause__, Dies) for e in raised)
    assert (running.reason, waiting.reason) == ("error", "error")
    assert not session.alive
    assert session.waiting == session.running == 0
    with pytest.raises(Closed, match="died"):
        session.submit(PROMPT)
    with pytest.raises(Closed, match="died"):
        list(running)
    session.close()


def test_a_session_that_nobody_has() -> None:
    session = cf.Session({"base": make()})
    request, thread = session.submit(PROMPT, **LONG), session._thread
    alive = weakref.ref(session)
    session.__dict__["circle"] = session
    del session
    gc.collect()
    assert alive() is None
    thread.join(30)
    assert not thread.is_alive()
    assert request.reason == "cancelled"


LAST = """
import sys
sys.path[:0] = {path!r}
import crossfade as cf
from tiny_models import make
def main():
    local = cf.Session({{"base": make()}})
    local.submit([7, 8], max_new_tokens=450, eos_token_id=None)
kept = cf.Session({{"base": make()}})
request = kept.submit([7, 8], max_new_tokens=450, eos_token_id=None)
next(iter(request))
main()
print("ends")
"""


def test_the_interpreter_ends() -> None:
    script = LAST.format(path=[p for p in sys.path if p])
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "ends\n", "")
