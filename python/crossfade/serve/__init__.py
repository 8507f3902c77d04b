"""An OpenAI-compatible server over a `crossfade.Session`: ``crossfade serve``.

`create_app` makes the application, for any ASGI server; `Background` runs it in a thread.
"""

from .app import create_app
from .server import Background
from .settings import Settings

__all__ = ["Background", "Settings", "create_app"]
