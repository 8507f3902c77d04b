"""`python -m crossfade.integrations.lm_eval`: the harness's command, which knows our model too."""

from ...extras import require
from .adapter import CrossfadeLM  # noqa: F401  # The import registers it.

require("lm_eval.__main__", "lm-eval").cli_evaluate()
