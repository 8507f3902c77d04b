"""The tiny models of decoding's tests."""

from __future__ import annotations
