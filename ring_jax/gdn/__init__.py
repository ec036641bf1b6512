"""The gated delta rule (GDN): linear attention with a state, on one device and across context ranks."""

from ring_jax.gdn.context import run as run
from ring_jax.gdn.conv import causal_convolution as causal_convolution
from ring_jax.gdn.mixer import GDNCache as GDNCache
from ring_jax.gdn.mixer import Heads as Heads
from ring_jax.gdn.operation import gated_delta_rule as gated_delta_rule
from ring_jax.gdn.plan import Cost as Cost
from ring_jax.gdn.plan import GDNShape as GDNShape
from ring_jax.gdn.plan import choose_way as choose_way
from ring_jax.gdn.plan import costs as costs
from ring_jax.gdn.spread import OneDevice as OneDevice
from ring_jax.gdn.spread import Spread as Spread
