"""Blends: what is decoded, the algebra that makes it, and its text."""
