"""The layers of Qwen3.5, written as for one device: what of them needs the mesh is in `collectives.py`
and `pass_.py`.

Sources: transformers' `modeling_qwen3_5.py`, `modeling_qwen3_5_moe.py`, `modeling_qwen3_next.py`; Qiu et al., Gated Attention
(arXiv:2505.06708).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ring_jax import gdn
from ring_jax.gdn import by_head
from ring_jax.gdn.hopper import decode
from ring_jax.gdn.hopper.decode import StepWeights
from ring_jax.gdn.mixer import MixerWeights, mix, projects_own_heads
from ring_jax.models.qwen3_5.collectives import Collectives
from ring_jax.models.qwen3_5.config import FULL, Config
from ring_jax.models.qwen3_5.in_place import InPlace
from ring_jax.models.qwen3_5.init import HeadRows, stacked
from ring_jax.models.qwen3_5.pass_ import Pass
from ring_jax.models.qwen3_5.sharding import (
    EXPERTS,
    FEATURES,
    KEY_VALUE_HEADS,
    LINEAR_HEADS,
    REDUCED,
    REDUCED_FEATURES,
    REDUCED_HEADS,
    WHOLE,
)
from ring_jax.moe import MoEWeights, RouterStats, moe
from ring_jax.nn.gdn import gated_rms_norm
from ring_jax.nn.hopper import heads as hopper_heads
from ring_jax.nn.norm import Normed
from ring_jax.nn.rope import angles, check_rotary, rotate


class Group(nnx.Module):
    """The layers of all groups, parameters stacked along a leading axis that the scan walks."""

    def __init__(self, config: Config, dtype: Any):
        self.layers = nnx.List([Layer(config, kind, dtype) for kind in config.layer_types[: config.period]])


class Layer(nnx.Module):
    """x += mixer(norm(x));  x += mlp(norm(x)). Mixer and MLP make the norm and the sum, each within its products."""

    def __init__(self, config: Config, kind: str, dtype: Any):
        make = functools.partial(stacked, config.groups)
        width = config.hidden_size
        self.config, self.kind = config, kind
        self.input_norm = make((width,), (WHOLE,), "zeros", dtype)
        self.mixer = (FullAttention if kind == FULL else GatedDeltaNet)(config, make, dtype)
        self.post_norm = make((width,), (WHOLE,), "zeros", dtype)
        self.mlp = (MLP if config.experts is None else SparseMLP)(config, make, dtype)

    def __call__(self, x: Array, past: Any, here: Pass, valid: Array | None) -> Any:
        """(x, what the mixer leaves for later passes, router statistics or None).

        past: of a GDN layer its cache, of full attention its number among those of the model."""
        epsilon = self.config.norm_epsilon
        x, left = self.mixer(Normed(x, self.input_norm[...], epsilon), past, here)
        x, stats = self.mlp(Normed(x, self.post_norm[...], epsilon), here, valid)
        return x, left, stats


class FullAttention(nnx.Module):
    """Grouped-query attention with q/k norm, partial RoPE and an output gate.

    What a token is projected to lies in one parameter, key-value head by key-value head: the queries and gates that share
    it, then its key and its value. So it is one product, and a tensor axis cuts it between heads.
    """

    def __init__(self, config: Config, make: Any, dtype: Any):
        width, size, kv_heads = config.hidden_size, config.head_dim, config.num_kv_heads
        heads = config.num_heads * size
        self.config = config
        self.queries = 2 * heads // kv_heads  # for each head: query, gate
        self.in_proj = make((width, kv_heads * (self.queries + 2 * size)), (REDUCED, KEY_VALUE_HEADS), "rows", dtype)
        self.o = make((heads, width), (REDUCED_HEADS, WHOLE), "rows", dtype)
        self.q_norm = make((size,), (WHOLE,), "zeros", dtype)
        self.k_norm = make((size,), (WHOLE,), "zeros", dtype)

    def __call__(self, given: Normed, layer: Any, here: Pass) -> tuple[Array, tuple[Array, Array]]:
        projected = here.product(given, self.in_proj[...])
        queries, k, v = _by_head(projected, (self.queries, self.config.head_dim, self.config.head_dim))
        q, gate = jnp.split(queries.reshape(*given.shape[:2], -1, 2 * self.config.head_dim), 2, axis=-1)
        q, k = self._normed_and_turned(projected, q, k, here.positions)
        out_btnh = here.attend(q, k, v, layer)
        gated = (out_btnh * jax.nn.sigmoid(gate)).reshape(*given.shape[:2], -1)
        return here.add_product(given.x, gated, self.o[...]), (k, v)

    def _normed_and_turned(self, projected: Array, q: Array, k: Array, positions: Array) -> tuple[Array, Array]:
        """Queries and keys, which are parts of `projected`, with norm and rotary embedding."""
        config, size = self.config, self.config.head_dim
        rotary = check_rotary(size, config.rope_theta, config.rotary_fraction)
        cos, sin = angles(positions, rotary, config.rope_theta)
        if hopper_heads.worthwhile(projected, size, rotary):
            group, weights = self.queries // (2 * size), (self.q_norm[...], self.k_norm[...])
            options: Any = {"group": group, "epsilon": config.norm_epsilon}
            return hopper_heads.queries_and_keys(projected, *weights, cos, sin, **options)
        both = (q, self.q_norm), (k, self.k_norm)
        q, k = (rotate(norm(x, weight, config), cos[:, :, None], sin[:, :, None]) for x, weight in both)
        return q, k


class GatedDeltaNet(nnx.Module):
    """The gated delta rule behind a short convolution, before a gated norm; `ring_jax.gdn.mixer` has the formulas.

    What a token is projected to lies in one parameter, key head by key head: its query and key, then of the value heads
    that it serves the values, gates z, and b and a (`ring_jax.gdn.by_head`). So it is one product, whose readers take it as it
    lies, and a tensor axis cuts it between heads.
    """

    def __init__(self, config: Config, make: Any, dtype: Any):
        width, heads = config.hidden_size, config.linear
        self.config = config
        keys, _, values = heads.parts
        n, taps, rows = heads.value_heads, config.conv_width, HeadRows(sum(heads.of_key_head), heads.stride)
        self.in_proj = make((width, heads.key_heads * heads.stride), (REDUCED, LINEAR_HEADS), rows, dtype)
        self.conv_q = make((taps, keys), (WHOLE, LINEAR_HEADS), "rows", dtype)
        self.conv_k = make((taps, keys), (WHOLE, LINEAR_HEADS), "rows", dtype)
        self.conv_v = make((taps, values), (WHOLE, LINEAR_HEADS), "rows", dtype)
        self.A_log = make((n,), (LINEAR_HEADS,), "decay", jnp.float32)
        self.dt_bias = make((n,), (LINEAR_HEADS,), "time_step", dtype)
        self.norm = make((heads.value_size,), (WHOLE,), "ones", jnp.float32)
        self.o = make((values, width), (REDUCED_HEADS, WHOLE), "rows", dtype)

    def __call__(self, given: Normed, cache: gdn.GDNCache | InPlace | None, here: Pass) -> tuple[Array, Any]:
        if isinstance(cache, InPlace):
            return self._step(given, cache, here)
        x_btd = given.array()
        partition, width, heads = here.partition, x_btd.shape[-1], self.config.linear.share(here.tensor_ranks)
        conv = jnp.concatenate([self.conv_q[...], self.conv_k[...], self.conv_v[...]], axis=-1)
        weights: Any = functools.partial(
            MixerWeights, conv=conv, a_log=self.A_log[...], dt_bias=self.dt_bias[...], heads=heads
        )
        if projects_own_heads(heads, width, partition):
            w = by_head.split(here.weight(self.in_proj[...], 0, width, x_btd), heads)
            parts = by_head.inputs(w, heads), by_head.gate(w, heads), by_head.strength_and_decay(w, heads)
            # Cut before the products: XLA would take the cuts into them, and those run at 60% of the speed (32K tokens).
            qkv, z, ba = jax.lax.optimization_barrier(parts)
            out, cache = mix(weights((qkv,), (ba,)), x_btd, cache, partition)
            gate = here.product(x_btd, z.reshape(width, -1)).reshape(out.shape)
        else:
            # Behind a barrier: from a product in its own shape XLA takes no gates into a fusion, it copies them first.
            projected = jax.lax.optimization_barrier(by_head.split(here.product(x_btd, self.in_proj[...]), heads))
            gate = by_head.gate(projected, heads)
            out, cache = mix(weights((), ()), x_btd, cache, partition, projected=projected)
        out = gated_rms_norm(out.reshape(gate.shape), gate, self.norm[...], self.config.norm_epsilon)
        return self._leave(given.x, out, here), cache

    def _leave(self, x_btd: Array, out: Array, here: Pass) -> Array:
        return here.add_product(x_btd, out.reshape(*out.shape[:2], -1), self.o[...])

    def _step(self, given: Normed, cache: InPlace, here: Pass) -> tuple[Array, tuple[Array, Array]]:
        """One token in one kernel between the projections: y, and for `StatesInPlace` all states and this layer's tail."""
        heads, epsilon = self.config.linear.share(here.tensor_ranks), self.config.norm_epsilon
        projected, whole = by_head.split(here.product(given, self.in_proj[...]), heads), cache.mixer
        conv = whole.conv_q[...], whole.conv_k[...], whole.conv_v[...]
        weights = StepWeights(conv, whole.A_log[...], whole.dt_bias[...], whole.norm[...])
        present = None if here.valid is None else here.valid[:, 0]
        options: Any = {"heads": heads, "norm_epsilon": epsilon, "at": cache.at, "present": present}
        out, states, tail = decode.step(projected, cache.states, cache.tails, weights, **options)
        return self._leave(given.x, out, here), (states, tail)


class MLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: Config, make: Any, dtype: Any):
        width, size = config.hidden_size, config.mlp_size
        self.gate_up = make((width, 2, size), (REDUCED, WHOLE, FEATURES), "pairs", dtype)
        self.down = make((size, width), (REDUCED_FEATURES, WHOLE), "rows", dtype)

    def __call__(self, given: Normed, here: Collectives, valid: Array | None) -> tuple[Array, None]:
        hidden = here.swiglu(given, _side_by_side(self.gate_up[...]))
        return here.add_product(given.x, hidden, self.down[...]), None


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

    def __call__(self, given: Normed, here: Collectives, valid: Array | None) -> tuple[Array, RouterStats]:
        x_btd = given.array()
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
        hidden = here.swiglu(x_btd, _side_by_side(self.shared_gate_up[...]))
        shared = here.sum_tensor(here.product(hidden, self.shared_down[...]))
        gate = jax.nn.sigmoid(jnp.einsum("btd,d->bt", x_btd, self.shared_gate[...].astype(dtype)))[..., None]
        return given.x + (routed.reshape(x_btd.shape) + gate * shared), stats


def _by_head(x: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """The last axis, head by head parts of the given sizes: each part [..., heads, size]."""
    x = x.reshape(*x.shape[:-1], -1, sum(sizes))
    return jnp.split(x, list(itertools.accumulate(sizes[:-1])), axis=-1)


def _side_by_side(pairs: jax.Array) -> jax.Array:
    """[rows here, 2, F] as [rows here, 2 F]."""
    return pairs.reshape(pairs.shape[0], -1)


def norm(x: jax.Array, weight: Any, config: Config) -> jax.Array:
    return Normed(x, weight[...], config.norm_epsilon).array()
