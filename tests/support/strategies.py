"""The strategies over one mesh axis: a new one meets every test that walks over all."""

from ring_jax.context.strategies import STRATEGIES

SINGLE_AXIS = tuple(name for name in STRATEGIES if name != "ring_ulysses")
