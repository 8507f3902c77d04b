"""The evaluation harness `lm-eval` over blends: ``CrossfadeLM``, and its command line.

``python -m crossfade.integrations.lm_eval`` is the harness's own command, with one model more:
``--model crossfade``.
"""

from .adapter import CrossfadeLM

__all__ = ["CrossfadeLM"]
