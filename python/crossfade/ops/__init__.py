"""The numerical ops: blending and sampling, what decoding and searches run most, and log-probs."""

from .attention import attend_ as attend_
from .blending import blend as blend
from .blending import blend_sample as blend_sample
from .linear import Lora as Lora
from .linear import linear as linear
from .logp.api import linear_logp as linear_logp
from .packed import Packed as Packed
from .search import chunk_select as chunk_select
from .search import fork_cache_ as fork_cache_
from .shards import Partial as Partial
from .shards import Reduce as Reduce
from .shards import all_gather as all_gather
from .shards import merge as merge
from .types import BlendSample as BlendSample
from .types import Draw as Draw
from .types import Inputs as Inputs
from .types import LinearLogp as LinearLogp
from .types import Part as Part
from .types import Support as Support

# The names imported above. Modules of the package are not among them: they have no `__module__`.
__all__ = sorted(
    name for name, x in globals().items() if getattr(x, "__module__", "").startswith(f"{__name__}.")
)
