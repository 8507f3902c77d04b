"""Many clients at once over a real session: those that give up leave nothing behind."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import crossfade as cf
import httpx
from servers import running, soon
from tiny_models import EOS, make, make_tokenizer

PROMPT = "the film was"


def test_two_hundred_clients_give_up() -> None:
    """Each waits for half a second, most of them for a place. A fresh one is answered at once."""
    base = cf.Model(make(seed=5), tokenizer=make_tokenizer())
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 480,
        "logit_bias": {str(EOS): -100},
    }
    with (
        cf.Session({"base": base}, max_batch=4, max_waiting=1000) as session,
        running(session) as server,
    ):

        async def give_up(client: httpx.AsyncClient) -> bool:
            try:
                await client.post("/v1/completions", json=body, timeout=0.5)
            except httpx.TimeoutException:
                return True
            return False

        async def crowd() -> list[bool]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, limits=limits) as client:
                return list(await asyncio.gather(*(give_up(client) for _ in range(200))))

        assert sum(asyncio.run(crowd())) > 150
        start = time.monotonic()
        answer = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 3})
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] <= 3
        assert time.monotonic() - start < 5
        soon(lambda: session.running == session.waiting == 0)
        soon(lambda: server.app.state.service.calls.load == 0)
