"""The mixing desk at /: its files, and what it must know of the server."""

from __future__ import annotations

import dataclasses
import mimetypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import crossfade

from .. import formula
from .service import Service
from .submitting import default_model, models_of

# Some systems have no types of these, or wrong ones.
TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".svg": "image/svg+xml",
}
INDEX = "index.html"


@dataclasses.dataclass(frozen=True)
class File:
    """A file of the page."""

    content: bytes
    type: str


def files_of(folder: Path) -> dict[str, File]:
    """The files of a page, by their paths at the server. They are read once, when it begins."""
    found: dict[str, File] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and not path.name.startswith((".", "_")):
            kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
            found[f"/{path.name}"] = File(path.read_bytes(), kind or "application/octet-stream")
    if f"/{INDEX}" in found:
        found["/"] = found[f"/{INDEX}"]
    return found


class Desk(BaseModel):
    """What a page of faders must know of the server.

    Attributes:
        model: what /v1/models calls the default blend.
        terms: what formulas may name.
        values: values that formulas may name.
        blend: the formula of the default blend.
        faders: names in it that are no models, in their order of the alphabet.
        weights: where they stand.
        searches: values that a search may be decided by.
        judges: what may compare the texts of a tournament.
        drafts: what may guess tokens.
        limits: how much a request may ask for.
        needs_key: whether requests must have an API key.
    """

    model: str
    terms: list[str]
    values: list[str]
    blend: str
    faders: list[str]
    weights: dict[str, float]
    searches: list[str]
    judges: list[str]
    drafts: list[str]
    has_chat_template: bool
    limits: dict[str, float | None]
    needs_key: bool
    version: str


def faders_of(service: Service) -> list[str]:
    """The names in the default blend that are no models."""
    session = service.session
    return sorted(formula.names_in(session.blend) - {*session.terms})


def desk_of(service: Service) -> Desk:
    session, settings = service.session, service.settings
    limits: Mapping[str, Any] = dataclasses.asdict(settings.limits)
    return Desk(
        model=default_model(session, settings),
        terms=models_of(session),
        values=list(session.values),
        blend=session.blend,
        faders=faders_of(service),
        weights=dict(session.weights),
        searches=list(settings.values),
        judges=list(settings.judges),
        drafts=["prompt", *settings.drafts],
        has_chat_template=service.has_chat_template,
        limits=dict(limits),
        needs_key=bool(settings.keys),
        version=crossfade.__version__,
    )
