"""What all requests to one server share."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

from ..decoding.chats import template_of
from .calls import Calls
from .contract import Session
from .errors import APIError
from .metrics import Metrics
from .settings import Settings
from .tokens import Spelling

LOG = logging.getLogger("crossfade.serve")


class Service:
    """What all requests to one server share.

    Args:
        session: what decodes.
        settings: what the server was told when it began.
    """

    def __init__(self, session: Session, settings: Settings) -> None:
        self.session, self.settings = session, settings
        self.calls = Calls(settings.limits)
        self.metrics = Metrics(session, self.calls)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the first term.

        Raises:
            APIError: it has none.
        """
        if self.session.tokenizer is None:
            raise APIError(400, "the model has no tokenizer; prompts must be token ids")
        return self.session.tokenizer

    @cached_property
    def spelling(self) -> Spelling:
        return Spelling(self.tokenizer)

    @cached_property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.session.tokenizer, "chat_template", None))

    @cached_property
    def knows_developers(self) -> bool:
        """Whether the chat template has a place for messages of the role "developer"."""
        return "developer" in (template_of(self.session.tokenizer) or "")

    def text_of(self, prompt: Any) -> str:
        """A prompt as a text."""
        if isinstance(prompt, str):
            return prompt
        return self.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)

    def ids_of(self, prompt: Any) -> list[int]:
        """The tokens of a prompt."""
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)

    def log_failure(self, id: str, error: BaseException) -> None:
        """Note why a request failed; an error without a name for clients, with where it happened.

        Prompts and texts are never logged.
        """
        known = isinstance(error, APIError)
        LOG.error("%s: %s: %s", id, type(error).__name__, error, exc_info=None if known else error)
