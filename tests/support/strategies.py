"""The strategies over one mesh axis: a new one meets every test that walks over all."""

from ring_jax.context.strategies import STRATEGIES

# `pass_q` sends as `ring` does, `ulysses` as `ring_ulysses`: what is dear per strategy leaves them to the slow run.
ALIKE = ("pass_q", "ulysses")
SINGLE_AXIS = tuple(name for name in STRATEGIES if name != "ring_ulysses")
