"""The gated delta rule (GDN): linear attention with a state, on one device and across context ranks."""

from ring_jax.gdn.operation import gated_delta_rule as gated_delta_rule
