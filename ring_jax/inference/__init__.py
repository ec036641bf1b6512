"""Generating text: sampling, tokenizers, and an engine that runs many texts at once."""

from ring_jax.inference.engine import Engine as Engine
from ring_jax.inference.engine import Request as Request
from ring_jax.inference.engine import Stats as Stats
from ring_jax.inference.generate import Generation as Generation
from ring_jax.inference.generate import generate as generate
from ring_jax.inference.generate import stream as stream
from ring_jax.inference.sampling import Sampling as Sampling
from ring_jax.inference.sampling import sample as sample
