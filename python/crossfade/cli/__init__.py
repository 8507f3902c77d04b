"""The command line: a file a command, and what they share."""

from .main import main

__all__ = ["main"]
