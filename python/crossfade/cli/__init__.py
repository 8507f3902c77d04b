"""The command line: each command has a file, and `options` has what several commands share."""

from .main import main

__all__ = ["main"]
