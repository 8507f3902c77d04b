"""One call of a client that decodes, from its fields to its answer, streamed or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

import anyio.to_thread
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from . import submitting
from .answers import Answer, Change, CompletionDetails, Usage, number
from .contract import Piece, Request
from .errors import APIError, of_run, of_submit, refused
from .fields import joined
from .forms import Form, Head, Written
from .security import owner_of
from .service import Service
from .streams import DONE, GONE, WAITING, EventStream, GoneError, event, unless_gone
from .tokens import Token, tokens_of, tokens_of_scores

TOGETHER = 8  # prompts that are scored together
T = TypeVar("T")


async def respond(service: Service, http: HTTPRequest, form: Form) -> Response:
    """Answer a request.

    Raises:
        APIError: it was refused, or failed before a stream began.
    """
    exchange = Exchange(service, form, owner_of(http.scope))
    streams = False
    try:
        await unless_gone(http.receive, exchange.begin())
        if form.asked.stream:
            streams = True
            return EventStream(exchange.events(), exchange.end)
        answer = await unless_gone(http.receive, exchange.whole())
    except GoneError:
        return Response(status_code=GONE)
    finally:
        if not streams:
            exchange.end()
    return Response(answer.json_bytes(), media_type="application/json")


async def in_thread(work: Callable[[], T]) -> T:
    """What `work` gives, done beside the event loop, since it tokenises or waits for a lock."""
    return await anyio.to_thread.run_sync(work)


class Exchange:
    """A call of a client: first `begin`, then `whole` or `events`, then `end`.

    Args:
        owner: whose it is.

    Raises:
        APIError: a field is refused, or there is no room for what it costs.
    """

    def __init__(self, service: Service, form: Form, owner: str) -> None:
        self.service, self.form = service, form
        session, settings, asked = service.session, service.settings, form.asked
        limit = settings.limits.max_tokens
        most = limit if form.most is None else form.most
        if most > limit:
            raise refused("max_tokens", f"max_tokens is {most}; it must be at most {limit}")
        self.writes = most > 0  # else only the prompts are scored
        self.scores = form.echoes and form.tops is not None
        rows = len(form.prompts) * form.drawn * self.writes
        scored = len(form.prompts) * self.scores
        cost = submitting.cost_of(asked, rows, session, settings, scored=scored)
        self.options = submitting.options_of(asked, owner, session, settings) | form.options
        self.options["max_new_tokens"] = most
        if form.tops:
            self.options["top_logprobs"] = form.tops
        self.call = service.calls.open(form.prefix, owner, cost)
        model = asked.model or submitting.default_model(session, settings)
        self.head = Head(self.call.id, int(time.time()), model)
        self.written = [Written(i) for i in range(len(form.prompts) * form.drawn)]
        self.clocks = [service.metrics.clock() for _ in self.written]
        self.prompt_tokens = self.accepted = self.predicted = 0

    def end(self) -> None:
        """Cancel what is still under way."""
        self.call.close()

    # ---- What is asked of the session -----------------------------------------------------------

    async def begin(self) -> None:
        """Hand all texts to the session, which refuses them here, and score the prompts."""
        try:
            await in_thread(self._submit)
            if self.scores:
                await in_thread(self._score)
        except (APIError, asyncio.CancelledError):
            raise
        except Exception as error:
            found = of_submit(error, type(self.form.asked).model_fields)
            if found.status_code == 500:
                self.service.log_failure(self.head.id, error)
            raise found from error
        self.service.metrics.read(self.prompt_tokens)

    def _submit(self) -> None:
        """Hand the texts to the session, in a thread of its own."""
        form = self.form
        for i, prompt in enumerate(form.prompts):
            if form.echoes:
                for written in self._of_prompt(i):
                    written.echo = self.service.text_of(prompt)
            for sample in range(form.drawn * self.writes):
                request = self.service.session.submit(prompt, sample=sample, **self.options)
                self.call.add(request)
                self.prompt_tokens += len(request.prompt_ids) if sample == 0 else 0
        if form.asked.prediction is not None:
            text = joined(form.asked.prediction.content)
            self.predicted = len(self.service.ids_of(text)) * len(self.call.requests)

    def _score(self) -> None:
        """Score the prompts, in a thread of its own. What they say comes before each text.

        A prompt is read as what follows its first token. A few at a time are read together, and
        texts that are being written go on between.
        """
        session, tops = self.service.session, self.form.tops or 0
        known = {name: self.options.get(name) for name in ("blend", "weights")}
        each = [self.service.ids_of(prompt) for prompt in self.form.prompts]
        if not all(each):
            raise refused("prompt", "prompt has a text without tokens")
        for first in range(0, len(each), TOGETHER):
            some = [i for i in range(first, min(first + TOGETHER, len(each))) if len(each[i]) > 1]
            if not some:
                continue
            scores = session.score(
                [each[i][:1] for i in some],
                [each[i][1:] for i in some],
                timeout=self.service.settings.limits.seconds,
                top_logprobs=tops,
                **known,
            )
            for row, i in enumerate(some):
                for written in self._of_prompt(i):
                    written.tokens += tokens_of_scores(scores, row, each[i][1:])
        for i, ids in enumerate(each):
            for written in self._of_prompt(i):
                written.tokens.insert(0, Token(ids[0], None))
            self.prompt_tokens += 0 if self.writes else len(ids)

    def _of_prompt(self, i: int) -> list[Written]:
        return self.written[i * self.form.drawn : (i + 1) * self.form.drawn]

    async def _pieces(self) -> AsyncGenerator[tuple[Written, Piece | None] | None, None]:
        """The pieces of all texts as they come, and None as the last one of each.

        From time to time there is a None in place of the pair, so that a stream can say that it
        still waits.

        Raises:
            Exception: what made one of them fail.
        """
        queue: asyncio.Queue[tuple[Written, Piece | Exception | None] | None] = asyncio.Queue()

        async def follow(written: Written, request: Request) -> None:
            try:
                async for piece in request:
                    queue.put_nowait((written, piece))
                queue.put_nowait((written, None))
            except Exception as error:
                queue.put_nowait((written, error))

        async def pulse() -> None:
            while True:
                await asyncio.sleep(self.service.settings.pulse)
                queue.put_nowait(None)

        pairs = zip(self.written, self.call.requests, strict=False)
        tasks = [asyncio.ensure_future(follow(w, r)) for w, r in pairs]
        left = len(tasks)
        tasks.append(asyncio.ensure_future(pulse()))
        try:
            while left:
                item = await queue.get()
                if item is None:
                    yield None
                    continue
                written, piece = item
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    left -= 1
                    await self._finish(written)
                yield written, piece
        finally:
            for task in tasks:
                task.cancel()

    async def _finish(self, written: Written) -> None:
        """Note how a text has ended."""
        request = self.call.requests[written.index]
        reason = request.reason
        written.finish = "length" if reason in ("length", "timeout") else "stop"
        written.cut = reason if reason in ("cancelled", "timeout") else None
        written.changes = [Change(tokens=n, weights=dict(w)) for n, w in request.changes]
        if "draft" in self.options or "search" in self.options:
            output = await request
            if output.tokens_by_draft is not None:
                self.accepted += int(output.tokens_by_draft[0])
            if output.values is not None:
                written.value = number(float(output.values.flatten()[0]))

    def _take(self, written: Written, piece: Piece) -> list[Token]:
        """Count the tokens of a piece."""
        tokens = tokens_of(piece)
        self.clocks[written.index].wrote(len(tokens))
        written.count += len(tokens)
        return tokens

    # ---- What is answered -----------------------------------------------------------------------

    async def whole(self) -> Answer:
        """The answer, when all texts have ended.

        Raises:
            APIError: one of them has failed.
        """
        try:
            async with aclosing(self._pieces()) as pieces:
                async for item in pieces:
                    written, piece = item or (None, None)
                    if written is not None and piece is not None:
                        written.tokens += self._take(written, piece)
                        written.text += piece.text
        except Exception as error:
            self.service.log_failure(self.head.id, error)
            raise of_run(error) from error
        return self.form.whole(self.head, self._kept(), self._usage())

    def _kept(self) -> list[Written]:
        """The texts that are given: of each prompt the likeliest, if there are more."""
        found = []
        for i in range(len(self.form.prompts)):
            each = self._of_prompt(i)
            if self.form.kept < self.form.drawn:
                each = sorted(each, key=lambda w: -w.mean_logprob)[: self.form.kept]
            found += each
        for index, written in enumerate(found):
            written.index = index
        return found

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as the events of a stream. An error is one, too."""
        try:
            async with aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    yield WAITING if chunk is None else event(chunk.json_bytes())
        except Exception as error:
            self.service.log_failure(self.head.id, error)
            yield event(of_run(error).json_bytes())
        yield DONE

    async def _chunks(self) -> AsyncGenerator[Answer | None, None]:
        form, head = self.form, self.head
        for written in self.written:
            if (chunk := form.opening(head, written.index)) is not None:
                yield chunk
            if form.echoes:
                yield form.part(head, written.index, written.echo, written.tokens)
            if not self.writes:
                yield form.closing(head, written)
        tells = form.tops is not None or any(name.startswith("return_") for name in self.options)
        async with aclosing(self._pieces()) as pieces:
            async for item in pieces:
                if item is None:
                    yield None
                    continue
                written, piece = item
                if piece is None:
                    yield form.closing(head, written)
                    continue
                tokens = self._take(written, piece)
                if piece.text or (tells and tokens):
                    yield form.part(head, written.index, piece.text, tokens)
        if form.asked.tells_usage:
            yield form.total(head, self._usage())

    def _usage(self) -> Usage:
        completion = sum(w.count for w in self.written)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion,
            total_tokens=self.prompt_tokens + completion,
            completion_tokens_details=CompletionDetails(
                accepted_prediction_tokens=self.accepted,
                rejected_prediction_tokens=max(0, self.predicted - self.accepted),
                reasoning_tokens=0,
                audio_tokens=0,
            ),
        )
