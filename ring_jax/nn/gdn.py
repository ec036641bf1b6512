"""The gated-delta-rule layer of Qwen3.5 and Qwen3-Next, on one device or over a context-parallel mesh axis."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from ring_jax import _repr
from ring_jax._checks import (
    check_array,
    check_choice,
    check_count,
    check_dtype,
    check_instance,
    check_number,
    renamed_arguments,
)
from ring_jax.context import ContextParallel
from ring_jax.gdn.checks import check_segments, state_dtype
from ring_jax.gdn.cost import STRATEGIES, GDNShape
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.mixer import GDNCache, MixerWeights, mix
from ring_jax.gdn.partition import OneDevice, Partition
from ring_jax.gdn.rule import check_options
from ring_jax.gdn.sharded import run
from ring_jax.nn.placement import place_parameters
from ring_jax.nn.projections import check_projections

PROJECTIONS = ("separate", "fused")


def _heads(num_key_heads: int, num_value_heads: int, key_head_dim: int, value_head_dim: int) -> Heads:
    check_count("num_key_heads", num_key_heads, 1)
    check_count("num_value_heads", num_value_heads, 1)
    check_count("key_head_dim", key_head_dim, 1)
    check_count("value_head_dim", value_head_dim, 1)
    if num_value_heads % num_key_heads:
        raise ValueError(f"num_value_heads must be a multiple of num_key_heads: {num_value_heads} and {num_key_heads}")
    return Heads(num_key_heads, num_value_heads, key_head_dim, value_head_dim)


class GatedDeltaNet(nnx.Module):
    """Linear attention with a decaying, corrected state, behind a short convolution and before a gated norm.

        q, k, v = silu(conv(x Wqkv));   q, k = l2norm(q), l2norm(k)
        beta = sigmoid(x Wb);   log_decay = -exp(A_log) softplus(x Wa + dt_bias)
        o = gated_delta_rule(q, k, v, log_decay, beta)
        y = (w o / rms(o) * silu(x Wz)) Wout

    With a context, x is [B, T, D] in the order of the context's layout and the layer spreads itself over its mesh axis
    (`strategy`). A run of several layers is better spread as a whole, by `ring_jax.gdn.run`, whose `partition` goes to each
    layer's call; the layers' own `context` stays None then. Parameters are the same either way.

    Args:
      features: D, the model width.
      num_key_heads, num_value_heads: value heads must be a multiple of key heads.
      key_head_dim, value_head_dim: d_k and d_v.
      conv_width: W, tokens that the convolution sees, the current one included.
      norm_epsilon: added to the mean square in the output norm.
      projections: "separate" (Qwen3.5: ``in_proj_qkv``, ``in_proj_z``, ``in_proj_b``, ``in_proj_a``) or "fused"
        (Qwen3-Next: ``in_proj_qkvz``, ``in_proj_ba``, grouped by key head). The fused form is cut apart at every call;
        to decode fast, convert once with `split_fused_projections`.
      context: the mesh axes and the layout; None for one device.
      strategy: with a context, "batch", "head", "state" or "auto".
      implementation: of the gated delta rule (default: by length).
      dtype: of the computation (default: that of x). The state, the decay and both norms are float32 in any case.
      param_dtype: of the projections and the convolution. A_log, dt_bias and the norm's weight are float32.
      precision: of the projections.
      kernel_init: initialiser of the kernels.
      rngs: for the initial parameters.

    Raises:
      ValueError: for head counts that do not fit together or an unknown form of projections.

    Example:
      >>> layer = GatedDeltaNet(16, 1, 2, 8, 8, rngs=nnx.Rngs(0))
      >>> y, cache = layer(jnp.ones((1, 7, 16)))
      >>> y_next, cache = layer(jnp.ones((1, 1, 16)), cache)
      >>> y_next.shape
      (1, 1, 16)

    Sources: Yang, Kautz, Hatamizadeh, Gated Delta Networks (arXiv:2412.06464); transformers' `Qwen3_5GatedDeltaNet`
    and `Qwen3NextGatedDeltaNet`.
    """

    @renamed_arguments(way="strategy")
    def __init__(
        self,
        features: int,
        num_key_heads: int,
        num_value_heads: int,
        key_head_dim: int,
        value_head_dim: int,
        *,
        conv_width: int = 4,
        norm_epsilon: float = 1e-6,
        projections: str = "separate",
        context: ContextParallel | None = None,
        strategy: str = "auto",
        implementation: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        check_count("features", features, 1)
        check_count("conv_width", conv_width, 1)
        check_number("norm_epsilon", norm_epsilon, above=0)
        check_choice("projections", projections, PROJECTIONS)
        check_options(None, implementation)
        check_choice("strategy", strategy, ("auto", *STRATEGIES))
        check_instance("context", context, ContextParallel, "a ring_jax.ContextParallel", optional=True)
        check_projections(dtype, param_dtype, precision, kernel_init, rngs)
        self.features, self.conv_width, self.norm_epsilon = features, conv_width, norm_epsilon
        self.heads = heads = _heads(num_key_heads, num_value_heads, key_head_dim, value_head_dim)
        self.projections = projections
        self.context, self.strategy, self.implementation = context, strategy, implementation
        self.dtype, self.precision = dtype, precision

        kernel_init = nnx.initializers.lecun_normal() if kernel_init is None else kernel_init
        options: Any = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision, "kernel_init": kernel_init}
        linear: Any = functools.partial(nnx.Linear, use_bias=False, rngs=rngs, **options)
        self._make_projections(linear)
        # A fan-in of W for each feature by itself.
        conv = jax.random.normal(rngs.params(), (conv_width, heads.features)) * conv_width**-0.5
        self.conv = nnx.Param(conv.astype(param_dtype))
        decays = jax.random.uniform(rngs.params(), (num_value_heads,), jnp.float32, 1.0, 16.0)
        self.A_log = nnx.Param(jnp.log(decays))
        self.dt_bias = nnx.Param(jnp.ones((num_value_heads,), jnp.float32))
        self.norm = nnx.Param(jnp.ones((value_head_dim,), jnp.float32))
        self.out_proj = linear(heads.parts[2], features)
        place_parameters(self, context)

    def _make_projections(self, linear: Any) -> None:
        width, heads, count = self.features, self.heads, self.heads.value_heads
        if self.projections == "separate":
            self.in_proj_qkv = linear(width, heads.features)
            self.in_proj_z = linear(width, heads.parts[2])
            self.in_proj_b = linear(width, count)
            self.in_proj_a = linear(width, count)
        else:
            self.in_proj_qkvz = linear(width, heads.features + heads.parts[2])
            self.in_proj_ba = linear(width, 2 * count)

    def __repr__(self) -> str:
        strategy = None if self.context is None else self.strategy
        return _repr.of_module(self, features=self.features, heads=self.heads, context=self.context, strategy=strategy)

    @renamed_arguments(spread="partition")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: GDNCache | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        seq_len: int | None = None,
        partition: Partition | None = None,
    ) -> tuple[Float[Array, "B T D"], GDNCache]:
        """Applies the layer.

        Args:
          x: [B, T, D] in the order of the context's layout (natural order without a context); any T.
          cache: of the tokens before; None to begin. It continues a row's first document where that has the segment
            id that the cache ended with.
          segment_ids: int [B, T], packed documents; negative ids are padding.
          seq_len: number of real tokens where x carries padding behind them (as ``to_layout`` adds).
          partition: inside `ring_jax.gdn.run`: how tokens lie there. It knows segment ids and padding already.

        Returns:
          y [B, T, D], zeros on padding, and the cache after the last valid token (the same on all context ranks).
        """
        check_array("x", x, "B T D", {"D": self.features})
        check_instance("cache", cache, GDNCache, "a ring_jax.gdn.GDNCache", optional=True)
        if cache is not None:
            self._check_cache(cache, x)
        check_segments(segment_ids, x.shape[0], x.shape[1], natural=False)
        if partition is not None:
            check_instance("partition", partition, Partition, "what ring_jax.gdn.run hands to its layers")
            if segment_ids is not None or seq_len is not None:
                raise ValueError("segment_ids and seq_len go to ring_jax.gdn.run, which hands them on in `partition`")
            return self._apply(x, cache, partition)
        if self.context is not None:
            graph, state = nnx.split(self)
            return run(
                _Layer(graph),
                state,
                x,
                context=self.context,
                strategy=self.strategy,
                shape=self.shape(dtype=self.dtype or x.dtype),
                caches=cache,
                segment_ids=segment_ids,
                seq_len=seq_len,
            )
        if seq_len is not None and check_count("seq_len", seq_len, 0, x.shape[1]) != x.shape[1]:
            valid = jnp.arange(x.shape[1], dtype=jnp.int32) < seq_len
            ids = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
            segment_ids = jnp.where(valid[None], ids, -1)
        return self._apply(x, cache, OneDevice(segment_ids))

    def shape(self, *, layers: int = 1, dtype: Any = jnp.bfloat16) -> GDNShape:
        """What `ring_jax.gdn.costs` and `run(strategy="auto")` need to know of a run of `layers` such layers. Batch and
        length are zero here; `run` fills them in, `dataclasses.replace` sets them by hand."""
        check_count("layers", layers, 1)
        check_dtype("dtype", dtype)
        itemsize = jnp.dtype(dtype).itemsize
        return GDNShape(0, 0, self.heads, self.features, self.conv_width, layers, itemsize)

    def empty_cache(self, batch: int, dtype: Any = jnp.float32) -> GDNCache:
        """The cache before the first token, for activations of `dtype`."""
        check_dtype("dtype", dtype)
        return GDNCache.empty(batch, self.heads, self.conv_width, self.dtype or dtype)

    def _check_cache(self, cache: GDNCache, x: Array) -> None:
        heads = self.heads
        sizes = {"B": x.shape[0], "N": heads.value_heads, "dk": heads.key_size, "dv": heads.value_size}
        sizes |= {"W-1": self.conv_width - 1, "F": heads.features}
        check_array("cache.state", cache.state, "B N dk dv", sizes)
        check_array("cache.tail", cache.tail, "B W-1 F", sizes)
        check_array("cache.segment", cache.segment, "B", sizes, kind="signed")

    def _apply(self, x: Array, cache: GDNCache | None, partition: Partition) -> tuple[Array, GDNCache]:
        x = x.astype(self.dtype or x.dtype)
        weights, z_kernel = self._weights()
        out, cache = mix(weights, x, cache, partition, self.implementation)
        z = jnp.matmul(x, z_kernel.astype(x.dtype), precision=self.precision)
        out = gated_rms_norm(out, z.reshape(out.shape), self.norm[...], self.norm_epsilon)
        out = self.out_proj(out.reshape(*out.shape[:2], out.shape[2] * out.shape[3]))
        if partition.segment_ids is not None:
            out = jnp.where((partition.segment_ids >= 0)[..., None], out, jnp.zeros_like(out))
        return out, cache

    def _weights(self) -> tuple[MixerWeights, Array]:
        if self.projections == "separate":
            qkv, z = self.in_proj_qkv.kernel[...], self.in_proj_z.kernel[...]
            ba = [self.in_proj_b.kernel[...], self.in_proj_a.kernel[...]]
        else:
            fused = self.in_proj_qkvz.kernel[...], self.in_proj_ba.kernel[...]
            qkv, z, *ba = split_fused_projections(*fused, self.heads)
        decay = self.A_log[...], self.dt_bias[...]
        return MixerWeights((qkv,), tuple(ba), self.conv[...], *decay, heads=self.heads, precision=self.precision), z


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer as `ring_jax.gdn.run` takes it: equal for layers built alike, so that eager calls share one program."""

    graph: Any

    def __call__(self, state: Any, x: Array, cache: GDNCache | None, partition: Partition) -> tuple[Array, GDNCache]:
        return nnx.merge(self.graph, state)._apply(x, cache, partition)


def gated_rms_norm(
    x: Float[Array, "B T *N dv"], gate: Float[Array, "B T *N dv"], weight: Float[Array, " dv"], epsilon: float
) -> Float[Array, "B T *N dv"]:
    """weight * x / sqrt(mean(x^2) + epsilon) * silu(gate), per head, in float32; returned in gate's dtype."""
    dtype = state_dtype(gate, weight)
    x = x.astype(dtype)
    x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return (
        weight.astype(dtype).reshape((1,) * (x.ndim - 1) + weight.shape) * x * jax.nn.silu(gate.astype(dtype))
    ).astype(gate.dtype)


def split_fused_projections(
    qkvz: Float[Array, "D F"], ba: Float[Array, "D ba"], heads: Heads
) -> tuple[Float[Array, "D qkv"], Float[Array, "D z"], Float[Array, "D N"], Float[Array, "D N"]]:
    """Qwen3-Next's fused kernels as Qwen3.5's separate ones: (in_proj_qkv, in_proj_z, in_proj_b, in_proj_a).

    Args:
      qkvz: for each key head [q (d_k) | k (d_k) | v (r d_v) | z (r d_v)], r value heads to a key head.
      ba: for each key head [b (r) | a (r)].
      heads: numbers and sizes of heads.
    """
    check_instance("heads", heads, Heads, "ring_jax.gdn.Heads")
    if heads.value_heads % heads.key_heads:
        raise ValueError(f"heads: {heads.value_heads} value heads are no multiple of {heads.key_heads} key heads")
    sizes = {"F": heads.features + heads.parts[2], "2N": 2 * heads.value_heads}
    check_array("qkvz", qkvz, "D F", sizes)
    check_array("ba", ba, "D 2N", sizes)
    width, r = qkvz.shape[0], heads.value_heads // heads.key_heads
    qkvz = qkvz.reshape(width, heads.key_heads, -1)
    ends = [heads.key_size, 2 * heads.key_size, 2 * heads.key_size + r * heads.value_size]
    q, k, v, z = (part.reshape(width, -1) for part in jnp.split(qkvz, ends, axis=-1))
    b, a = (part.reshape(width, -1) for part in jnp.split(ba.reshape(width, heads.key_heads, 2 * r), 2, axis=-1))
    return jnp.concatenate([q, k, v], axis=-1), z, b, a
