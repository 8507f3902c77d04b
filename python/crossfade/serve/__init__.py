"""An OpenAI-compatible server over a `crossfade.Session`: ``crossfade serve``.

``create_app(session)`` is the application, for any ASGI server.
"""

from .app import create_app
from .settings import Settings

__all__ = ["Settings", "create_app"]
