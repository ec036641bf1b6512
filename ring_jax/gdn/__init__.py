"""The gated delta rule (GDN): linear attention with a state, on one device and across context ranks."""

import warnings
from typing import Any

from ring_jax.gdn.api import gated_delta_rule as gated_delta_rule
from ring_jax.gdn.conv import causal_convolution as causal_convolution
from ring_jax.gdn.cost import Cost as Cost
from ring_jax.gdn.cost import GDNShape as GDNShape
from ring_jax.gdn.cost import choose_strategy as choose_strategy
from ring_jax.gdn.cost import costs as costs
from ring_jax.gdn.heads import Heads as Heads
from ring_jax.gdn.mixer import GDNCache as GDNCache
from ring_jax.gdn.partition import OneDevice as OneDevice
from ring_jax.gdn.partition import Partition as Partition
from ring_jax.gdn.partition import partition as partition
from ring_jax.gdn.sharded import run as run

_RENAMED: dict[str, Any] = {"Spread": Partition, "choose_way": choose_strategy}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"gdn.{name} is called {_RENAMED[name].__name__} now", DeprecationWarning, stacklevel=2)
        return _RENAMED[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
