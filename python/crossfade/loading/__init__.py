"""Models, blends and values as options name them: ``--model base=PATH --blend "base + ..."``.

`Plan` reads what options say and finds their mistakes before anything is loaded, and `Plan.load`
gives what they name as `Loaded`.
"""

from .formulas import value_of
from .loaded import Loaded
from .plan import Plan
from .serving import Served, ServerPlan

__all__ = ["Loaded", "Plan", "Served", "ServerPlan", "value_of"]
