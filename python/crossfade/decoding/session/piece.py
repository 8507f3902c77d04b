"""What a request has written since it was last asked."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Piece:
    """What a request has written since its last piece.

    Attributes:
        text: whole characters alone, without a stop string. All pieces joined are `Request.text`.
        ids: the tokens. A piece may have tokens and no text, where these begin a character or a
            stop string, and text and no tokens at the end.
        logprobs: of each token, nats: under the blend at temperature 1.
        top_logprobs: for each token the most likely ones there, the best first; on demand.
        term_logprobs: for each token its log-prob under each term; on demand.
        pushes: for each token how far each fader moved it away from the base, in nats; terms count
            as faders where the formula has none; on demand.
        kl: for each token KL(blend || first term), nats; on demand.
    """

    text: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    term_logprobs: list[dict[str, float]] = field(default_factory=list)
    pushes: list[dict[str, float]] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
