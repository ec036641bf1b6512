"""Mixture of experts: routing, grouped expert products, experts spread over a mesh axis."""

from ring_jax.moe.layer import MoEWeights as MoEWeights
from ring_jax.moe.layer import moe as moe
from ring_jax.moe.router import RouterStats as RouterStats
from ring_jax.moe.router import Routing as Routing
from ring_jax.moe.router import load_balance_loss as load_balance_loss
from ring_jax.moe.router import route as route
