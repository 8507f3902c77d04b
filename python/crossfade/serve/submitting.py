"""From the fields of a request to the arguments of `Session.submit`, and what they will cost.

Everything that multiplies work is bounded here, before any is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import formula
from ..checks import did_you_mean
from ..drafts import PROMPT, Draft
from ..search import BestOfN, ChunkBeamSearch, Tournament
from . import fields
from .contract import Session
from .errors import APIError, of_submit, refused
from .limits import Limits
from .settings import Settings

# What OpenAI's API draws with where a request does not say it.
DEFAULTS: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def models_of(session: Session) -> list[str]:
    """The terms that are blends by themselves, as values are not, in their order."""
    return [name for name in session.terms if name not in session.values]


def default_model(session: Session, settings: Settings) -> str:
    """What /v1/models calls the default blend: a single term by its own name."""
    return session.blend if session.blend in models_of(session) else settings.name


def blend_of(asked: fields.Generation, session: Session, settings: Settings) -> str | None:
    """The formula that a request is for; None is the default one.

    Raises:
        APIError: it names a model that there is not.
    """
    return asked.blend or blend_of_model(asked.model, session, settings)


def blend_of_model(name: str | None, session: Session, settings: Settings) -> str | None:
    """The formula that the name of a model stands for; None is the default one."""
    if name is None or name == default_model(session, settings):
        return None
    if name in models_of(session):
        return name
    known = [default_model(session, settings), *models_of(session)]
    raise APIError(
        404,
        f"there is no model {name!r:.80}; /v1/models lists those that there are"
        f"{did_you_mean(name, known)}",
        param="model",
        code="model_not_found",
    )


def terms_of(text: str, session: Session) -> int:
    """How many models read a row of a formula, at most: all of the session, the values that the
    formula names, and one more for each preset, which may add a prompt to a model.

    Raises:
        APIError: it cannot be read.
    """
    try:
        values = formula.names_in(text) & {*session.values}
        return len(models_of(session)) + len(values) + formula.calls_in(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        try:
            formula.evaluate(text, {})
        except ValueError as error:
            raise of_submit(error, ["blend"]) from None
        raise


def cost_of(
    asked: fields.Generation, rows: int, session: Session, settings: Settings, *, scored: int = 0
) -> int:
    """What a request costs, in rows times terms.

    Args:
        rows: its prompts times its choices.
        scored: prompts whose own tokens are scored.

    Raises:
        APIError: it costs more than one request may.
    """
    limits: Limits = settings.limits
    terms = 1
    if asked.lora is None:
        terms = terms_of(blend_of(asked, session, settings) or session.blend, session)
    if asked.guidance_scale is not None:
        terms += 1  # It reads the negative prompt.
    if terms > limits.terms:
        raise refused("blend", f"blend runs {terms} terms; it must run at most {limits.terms}")
    each = 1 if asked.search is None else asked.search.rows
    cost = (rows * each + scored) * terms
    if cost > limits.cost:
        raise refused(
            "n",
            f"the request costs {rows * each + scored} rows times {terms} terms, {cost}; it must "
            f"cost at most {limits.cost}: ask for fewer prompts, choices, rows or terms",
            "too_expensive",
        )
    return cost


def options_of(
    asked: fields.Generation, owner: str, session: Session, settings: Settings
) -> dict[str, Any]:
    """The arguments of `Session.submit` that all texts of a request share.

    Raises:
        APIError: a field names what the server does not have.
    """
    given = asked.model_dump(exclude_none=True, include={*DEFAULTS, "repetition_penalty"})
    options: dict[str, Any] = {**DEFAULTS, **given, "do_sample": True, "scope": owner}
    for name in ("presence_penalty", "frequency_penalty", "guidance_scale", "negative_prompt"):
        if getattr(asked, name) is not None:
            options[name] = getattr(asked, name)
    for name in ("return_term_logprobs", "return_pushes", "return_kl_to_base"):
        if getattr(asked, name):
            options[name] = True
    for name in ("weights", "systems"):
        if getattr(asked, name):
            options[name] = dict(getattr(asked, name))
    if (blend := blend_of(asked, session, settings)) is not None:
        options["blend"] = blend
    if asked.seed is not None:
        options["seed"] = asked.seed % 2**64
    if asked.stops:
        options["stop_strings"] = asked.stops
    if asked.logit_bias:
        options["logit_bias"] = {int(token): bias for token, bias in asked.logit_bias.items()}
    if settings.limits.seconds is not None:
        options["timeout"] = settings.limits.seconds
    if asked.lora is not None:
        options["lora"] = _lora(asked.lora, session)
    if asked.search is not None:
        options["search"] = _search(asked.search, settings)
    if asked.draft is not None:
        drafts = {PROMPT: PROMPT, **settings.drafts}
        options["draft"] = Draft(_named("draft", asked.draft, drafts))
    if asked.prediction is not None:
        options["draft"] = Draft(texts=[fields.joined(asked.prediction.content)])
    return options


def _lora(mix: list[fields.Lora], session: Session) -> dict[str, float]:
    """The scale of each adapter, by the name of its term."""
    terms = models_of(session)
    found: dict[str, float] = {}
    for adapter in mix:
        if adapter.id is not None and adapter.id >= len(terms):
            raise refused("lora", f"lora has the id {adapter.id}; the last one is {len(terms) - 1}")
        name = terms[adapter.id] if adapter.id is not None else str(adapter.name)
        _named("lora", name, dict.fromkeys(terms))
        if name in found:
            raise refused("lora", f"lora has {name!r} twice")
        found[name] = adapter.scale
    return found


def _search(asked: fields.Search, settings: Settings) -> Any:
    """The search, by what the server has loaded."""
    if asked.tournament is not None:
        if asked.value is None and (asked.judge is not None or settings.judges):
            return Tournament(_only("judge", asked.judge, settings.judges), asked.tournament)
        return Tournament(_only("value", asked.value, settings.values), asked.tournament)
    value = _only("value", asked.value, settings.values)
    if asked.best_of is not None:
        return BestOfN(asked.best_of, value)
    return ChunkBeamSearch(asked.width or 1, asked.samples or 4, asked.chunk_length or 5, value)


def _only(what: str, name: str | None, known: Mapping[str, Any]) -> Any:
    """What a search is decided by: what it names, or the only one that there is."""
    if name is None and len(known) == 1:
        return next(iter(known.values()))
    if name is None and known:
        raise refused("search", f"search.{what} is missing; there are {', '.join(known)}")
    return _named(f"search.{what}", name or "", known)


def _named(field: str, name: str, known: Mapping[str, Any]) -> Any:
    """What a name stands for, among what was loaded when the server began."""
    if name not in known:
        there = ", ".join(known) or "none"
        message = f"{field} is {name!r:.80}; this server has {there}{did_you_mean(name, known)}"
        raise refused(field, message, "unknown_name")
    return known[name]
