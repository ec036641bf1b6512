"""Keys and values in pages: a cache that grows with its sequence, over context ranks too, and attention to it.

A new chunk goes to its pages as it was computed, wherever its layout had it (`to_owners`, `write_pages`); a few new tokens attend to
the pages where they lie (`decode_attention`, `paged_attention`); a later chunk gathers them (`gather_pages`), and has them in the
layout `Striped(block=p)`. docs/kernels/paged.md shows a prefill in chunks.
"""

from ring_jax.context.merge import choose_merge as choose_merge
from ring_jax.context.paged import Placement as Placement
from ring_jax.context.paged import decode_attention as decode_attention
from ring_jax.context.paged import to_owners as to_owners
from ring_jax.context.paged import write_pages as write_pages
from ring_jax.flash.paged import gather_pages as gather_pages
from ring_jax.flash.paged import paged_attention as paged_attention
