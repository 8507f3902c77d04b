"""One HTML file of a front, with the texts of each point."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import measures, pictures
from .weightings import said

if TYPE_CHECKING:
    from .fronts import Front

DATA = "@DATA@"  # where the template has the front
HASH = "@HASH@"  # where its policy has the hash of the one script that may run


def html(front: Front) -> str:
    """The page; `Front.to_html` says what it shows."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    panels, pairs = [], pictures.pairs(front)
    for across, up in pairs:
        x, y = pictures.labels(across, up)
        panels.append({"x": x, "y": y, "across": across, "up": up})
    data: dict[str, Any] = {
        "rewards": front.rewards,
        "prompts": [_shown(prompt) for prompt in front.prompts],
        "texts": front.texts,
        "scores": front.scores,
        "panels": panels,
        "methods": [
            {"name": method, "color": _color(i), "mark": i % 4}
            for i, method in enumerate(front.methods)
        ],
        "points": [],
        "notes": _notes(front),
    }
    best = set()
    for method in front.methods:
        places = front.whole(method)
        on_front = measures.non_dominated(front.means(places)).tolist() if places else []
        best |= {i for i, b in zip(places, on_front, strict=True) if b}
    for i, point in enumerate(front.points):
        at = None
        if i in front.whole(point["method"]):
            at = [pictures.coordinates(front, i, *pair) for pair in pairs]
        data["points"].append(
            {**point, "at": at, "best": i in best, "said": said(point["weights"])}
        )
    # "<" is escaped, so that no text can end the script that holds it.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return template.replace(HASH, _hash(template)).replace(DATA, text)


def _hash(template: str) -> str:
    """The hash of the template's script, as a content security policy has it."""
    script = template.rpartition("<script>")[2].partition("</script>")[0]
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _color(method: int) -> str:
    """The colour of a method. Black is that of the page's text, which is light on a dark page."""
    color = pictures.COLORS[method % len(pictures.COLORS)]
    return "var(--ink)" if color == "#000000" else color


def _notes(front: Front) -> list[str]:
    """What a reader could not see: that points are missing."""
    lost = len(front.points) - sum(len(front.whole(method)) for method in front.methods)
    found = ["The sweep was interrupted."] if front.interrupted else []
    if lost:
        points = "1 point lacks" if lost == 1 else f"{lost} points lack"
        found.append(f"{points} a reward, and cannot be drawn.")
    return found


def _shown(prompt: Any) -> Any:
    """A prompt as a text: that of a chat has its roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
