"""Speculative decoding: something cheap guesses tokens, and all models check them in one forward.

`Loop` draws from the verified positions as it does from those of plain steps, so that the tokens
are the same. Here is what guesses: texts (`lookup.py`) or models (`models.py`), and how many tokens
at a time (`pace.py`).
"""
