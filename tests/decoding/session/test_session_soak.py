"""Many short requests from several threads: nothing of a session grows with their number.

pytest -m sweep tests/decoding/session/test_session_soak.py -s  # minutes, with its figures
"""

from __future__ import annotations

import gc
import random
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade.decoding.session import Full
from served import FADED, apart, until
from sweeps import every
from tiny_models import VOCAB

SLACK_MB, SLACK_OBJECTS = 16.0, 2000  # what allocators and caches of Python may keep


def held() -> tuple[int, float]:
    """The objects and the megabytes of the process."""
    gc.collect()  # Formulas are read by functions that refer to each other.
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(gc.get_objects()), pages * 4096 / 1e6


def ask(session: cf.Session, count: int, seed: int) -> None:
    pick = random.Random(seed)
    for i in range(count):
        asked: dict[str, Any] = {"do_sample": True, "max_new_tokens": pick.randrange(1, 9)}
        if i % 7 == 0:
            asked["presence_penalty"] = 0.5
        blend, prompt = pick.choice(["base", FADED]), [pick.randrange(3, VOCAB) for _ in range(6)]
        try:
            request = session.submit(prompt, blend=blend, scope=str(i % 3), seed=i, **asked)
        except Full:
            continue
        if i % 5 == 0:
            request.cancel()
        elif i % 5 == 1:
            assert sum(len(piece.ids) for piece in request) >= 1
        elif i % 5 == 2 and blend == FADED:
            with suppress(ValueError):  # It may have ended.
                request.weights(w=1.0)
        if i % 4 == 0:
            request.result(60)


@pytest.mark.parametrize("requests", every(2, [60, 20_000]))
def test_nothing_grows(requests: int) -> None:
    with cf.Session(apart(), weights={"w": 0.5}, max_batch=8, max_waiting=40) as session:

        def some(share: int) -> tuple[int, float]:
            threads = [
                threading.Thread(target=ask, args=(session, requests // share, i)) for i in range(4)
            ]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            session.submit([7], max_new_tokens=1).result(60)
            return held()

        some(2)
        objects, megabytes = some(8)
        caches = session.stats().cache_bytes
        later = some(2)
        print(
            f"{requests * 4.5:.0f} requests: {objects}, {megabytes:.1f} MB, then {later}"
        )  # for -s
        assert later[0] < objects + SLACK_OBJECTS
        assert later[1] < megabytes + SLACK_MB
        until(lambda: session.running == session.waiting == 0)
        assert session.stats().cache_bytes == caches
        assert len(session._worker.lanes) == 1
