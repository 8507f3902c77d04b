"""How much one request, and all of them together, may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields

# What the form of a request allows, whatever the server is told; see `fields.py`.
KEYS = 1024  # of any object in a body
CHOICES = 128  # texts to a prompt
PROMPTS = 1024  # prompts of one request
MESSAGES = 4096  # of a chat
STOPS = 16  # stop strings
STOP_LENGTH = 1024  # characters of one
BIASES = 1024  # tokens that logit_bias names
TOP_LOGPROBS = 20
NAMES = 64  # faders, systems or adapters that a request sets
FORMULA = 4096  # characters of a blend
ROWS = 1024  # of a search, for each text


@dataclass(frozen=True)
class Limits:
    """What a server allows. Each limit is checked before any work is done.

    A row is a text that is being written, and costs a forward of each term at every step. So what
    a request costs is counted in rows times terms: its prompts times its choices times the rows of
    its search times the terms of its blend.

    Attributes:
        body: bytes of a request's body.
        body_seconds: how long a client may take to send one.
        max_tokens: tokens of a text.
        cost: rows times terms of one request.
        load: rows times terms of all requests that run or wait.
        terms: models that a formula names, and system prompts that its presets add.
        seconds: how long a request may take; None: as long as it wants.
    """

    body: int = 4 << 20
    body_seconds: float = 30.0
    max_tokens: int = 4096
    cost: int = 512
    load: int = 8192
    terms: int = 16
    seconds: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{field.name} is {value}; it must be above 0")
