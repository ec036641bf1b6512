"""Generating text: sampling, tokenizers, prefill and decode."""

from ring_jax.inference.generate import Generation as Generation
from ring_jax.inference.generate import generate as generate
from ring_jax.inference.generate import stream as stream
from ring_jax.inference.sampling import Sampling as Sampling
from ring_jax.inference.sampling import sample as sample
