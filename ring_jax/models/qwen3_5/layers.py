"""The layers of Qwen3.5, written as for one device: what of them needs the mesh is in `local.py`.

Sources: transformers' `modeling_qwen3_5.py`, `modeling_qwen3_5_moe.py`, `modeling_qwen3_next.py`; Qiu et al., Gated Attention
(arXiv:2505.06708).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ring_jax import gdn
from ring_jax.gdn.checks import widened
from ring_jax.gdn.mixer import MixerWeights, mix, mix_projected
from ring_jax.models.qwen3_5.config import FULL, Config
from ring_jax.models.qwen3_5.initial import stacked
from ring_jax.models.qwen3_5.local import Local, Step
from ring_jax.models.qwen3_5.sharding import (
    EXPERTS,
    FEATURES,
    HEADS,
    KEY_VALUE_HEADS,
    LINEAR_HEADS,
    REDUCED,
    REDUCED_FEATURES,
    REDUCED_HEADS,
    WHOLE,
)
from ring_jax.moe import MoEWeights, RouterStats, moe
from ring_jax.nn.gdn import gated_rms_norm
from ring_jax.nn.rope import apply_rope


class Group(nnx.Module):
    """The layers of all groups, parameters stacked along a leading axis that the scan walks."""

    def __init__(self, config: Config, dtype: Any):
        self.layers = nnx.List([Layer(config, kind, dtype) for kind in config.layer_types[: config.period]])


class Layer(nnx.Module):
    """x += mixer(norm(x));  x += mlp(norm(x))."""

    def __init__(self, config: Config, kind: str, dtype: Any):
        make = functools.partial(stacked, config.groups)
        width = config.hidden_size
        self.config, self.kind = config, kind
        self.input_norm = make((width,), (WHOLE,), "zeros", dtype)
        self.mixer = (FullAttention if kind == FULL else GatedDeltaNet)(config, make, dtype)
        self.post_norm = make((width,), (WHOLE,), "zeros", dtype)
        self.mlp = (MLP if config.experts is None else SparseMLP)(config, make, dtype)

    def __call__(self, x: Array, mixer_cache: Any, here: Local, spread: Any, valid: Array | None):
        """(x, what the mixer leaves in the cache, router statistics or None)."""
        config = self.config
        mixed, left = self.mixer(norm(x, self.input_norm, config), mixer_cache, here, spread)
        x = x + mixed
        y, stats = self.mlp(norm(x, self.post_norm, config), here, valid)
        return x + y, left, stats


class FullAttention(nnx.Module):
    """Grouped-query attention with q/k norm, partial RoPE and an output gate."""

    def __init__(self, config: Config, make: Any, dtype: Any):
        width, size = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads * size, config.num_kv_heads * size
        self.config = config
        self.q = make((width, 2 * heads), (REDUCED, HEADS), "rows", dtype)  # for each head: query, gate
        self.k = make((width, kv_heads), (REDUCED, KEY_VALUE_HEADS), "rows", dtype)
        self.v = make((width, kv_heads), (REDUCED, KEY_VALUE_HEADS), "rows", dtype)
        self.o = make((heads, width), (REDUCED_HEADS, WHOLE), "rows", dtype)
        self.q_norm = make((size,), (WHOLE,), "zeros", dtype)
        self.k_norm = make((size,), (WHOLE,), "zeros", dtype)

    def __call__(self, x_btd: Array, cache: Any, here: Any, spread: None = None) -> tuple[Array, Array]:
        config, size = self.config, self.config.head_dim
        split = (*x_btd.shape[:2], -1, size)
        q, gate = jnp.split(here.product(x_btd, self.q[...]).reshape(*x_btd.shape[:2], -1, 2 * size), 2, axis=-1)
        k = here.product(x_btd, self.k[...]).reshape(split)
        v = here.product(x_btd, self.v[...]).reshape(split)
        rope = functools.partial(apply_rope, theta=config.rope_theta, rotary_fraction=config.rotary_fraction)
        q = rope(norm(q, self.q_norm, config), here.positions)
        k = rope(norm(k, self.k_norm, config), here.positions)
        out_btnh, left = here.attend(q, k, v, cache)
        gated = (out_btnh * jax.nn.sigmoid(gate)).reshape(*x_btd.shape[:2], -1)
        return here.sum_tensor(here.product(gated, self.o[...])), left


class GatedDeltaNet(nnx.Module):
    """The gated delta rule behind a short convolution, before a gated norm; `ring_jax.gdn.mixer` has the formulas."""

    def __init__(self, config: Config, make: Any, dtype: Any):
        width, heads = config.hidden_size, config.linear
        self.config = config
        keys, _, values = heads.parts
        n, taps = heads.value_heads, config.conv_width
        self.q = make((width, keys), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.k = make((width, keys), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.v = make((width, values), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.conv_q = make((taps, keys), (WHOLE, LINEAR_HEADS), "rows", dtype)
        self.conv_k = make((taps, keys), (WHOLE, LINEAR_HEADS), "rows", dtype)
        self.conv_v = make((taps, values), (WHOLE, LINEAR_HEADS), "rows", dtype)
        self.z = make((width, values), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.b = make((width, n), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.a = make((width, n), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.A_log = make((n,), (LINEAR_HEADS,), "decay", jnp.float32)
        self.dt_bias = make((n,), (LINEAR_HEADS,), "time_step", dtype)
        self.norm = make((heads.value_size,), (WHOLE,), "ones", jnp.float32)
        self.o = make((values, width), (REDUCED_HEADS, WHOLE), "rows", dtype)

    def __call__(self, x_btd: Array, cache: Any, here: Local, spread: gdn.Spread) -> tuple[Array, gdn.GDNCache]:
        width, heads = x_btd.shape[-1], self.config.linear.share(here.tensor_ranks)
        kernels = (self.q, self.k, self.v), (self.b, self.a)
        conv = jnp.concatenate([self.conv_q[...], self.conv_k[...], self.conv_v[...]], axis=-1)
        rest: dict[str, Any] = {"conv": conv, "a_log": self.A_log[...], "dt_bias": self.dt_bias[...], "heads": heads}
        if isinstance(here, Step):
            mixed, ba = (jnp.concatenate([here.product(x_btd, w[...]) for w in ws], axis=-1) for ws in kernels)
            out, cache = mix_projected(MixerWeights((), (), **rest), mixed, ba, cache, spread)
        else:
            qkv, split_ba = (tuple(here.weight(w[...], 0, width, x_btd) for w in ws) for ws in kernels)
            out, cache = mix(MixerWeights(qkv, split_ba, **rest), x_btd, cache, spread)
        gate = here.product(x_btd, self.z[...]).reshape(out.shape)
        out = gated_rms_norm(out, gate, self.norm[...], self.config.norm_epsilon)
        y = here.sum_tensor(here.product(out.reshape(*x_btd.shape[:2], -1), self.o[...]))
        return y, cache


class MLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: Config, make: Any, dtype: Any):
        width, size = config.hidden_size, config.mlp_size
        self.gate_up = make((width, 2, size), (REDUCED, WHOLE, FEATURES), "pairs", dtype)
        self.down = make((size, width), (REDUCED_FEATURES, WHOLE), "rows", dtype)

    def __call__(self, x_btd: Array, here: Local, valid: Array | None) -> tuple[Array, None]:
        return here.sum_tensor(_swiglu(x_btd, self.gate_up[...], self.down[...], here)), None


class SparseMLP(nnx.Module):
    """Routed experts and a gated shared one."""

    def __init__(self, config: Config, make: Any, dtype: Any):
        width, experts = config.hidden_size, config.experts
        assert experts is not None
        self.experts = experts
        self.router = make((width, experts.count), (REDUCED, WHOLE), "rows", dtype)
        gate_up = (experts.count, width, 2, experts.size)
        self.gate_up = make(gate_up, (EXPERTS, REDUCED, WHOLE, FEATURES), "pairs", dtype)
        self.down = make((experts.count, experts.size, width), (EXPERTS, REDUCED_FEATURES, WHOLE), "rows", dtype)
        self.shared_gate_up = make((width, 2, experts.shared_size), (REDUCED, WHOLE, FEATURES), "pairs", dtype)
        self.shared_down = make((experts.shared_size, width), (REDUCED_FEATURES, WHOLE), "rows", dtype)
        self.shared_gate = make((width,), (WHOLE,), "vector", dtype)

    def __call__(self, x_btd: Array, here: Local, valid: Array | None) -> tuple[Array, RouterStats]:
        width, experts, dtype = x_btd.shape[-1], self.experts, x_btd.dtype
        gate_up = here.weight(self.gate_up[...].astype(dtype), 1, width, x_btd, expert=True)
        down = here.weight(self.down[...].astype(dtype), 1, gate_up.shape[-1], x_btd, expert=True)
        weights = MoEWeights(here.weight(self.router[...].astype(dtype), 0, width, x_btd), gate_up, down)
        routed, stats = moe(
            x_btd.reshape(-1, width),
            weights,
            top_k=experts.per_token,
            renormalize=experts.renormalize,
            expert_axis=here.expert,
            tokens_spread=here.spread_over(here.expert),
            tensor_axis=here.tensor,
            valid=None if valid is None else valid.reshape(-1),
        )
        shared = here.sum_tensor(_swiglu(x_btd, self.shared_gate_up[...], self.shared_down[...], here))
        gate = jax.nn.sigmoid(jnp.einsum("btd,d->bt", x_btd, self.shared_gate[...].astype(dtype)))[..., None]
        return routed.reshape(x_btd.shape) + gate * shared, stats


def _swiglu(x, gate_up, down, here: Local):
    gate, up = jnp.split(here.product(x, gate_up.reshape(gate_up.shape[0], -1)), 2, axis=-1)
    return here.product(jax.nn.silu(gate) * up, down)


def norm(x, weight, config: Config):
    """x / rms(x) * (1 + weight), in float32."""
    wide = widened(x)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_epsilon)
    scale = 1 + weight[...].astype(wide.dtype)
    return (wide * scale.reshape((1,) * (wide.ndim - 1) + scale.shape)).astype(x.dtype)
