"""The Triton backend: each file launches the kernels of the op file that has its name."""

from .attention import attend_ as attend_
from .blending import blend as blend
from .blending import blend_sample as blend_sample
from .blending import draw_shard as draw_shard
from .search import chunk_select as chunk_select
from .search import fork_cache_ as fork_cache_
