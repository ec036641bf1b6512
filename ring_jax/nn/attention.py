"""A self-attention layer that runs on one device or over a context-parallel mesh axis, with the same parameters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ring_jax import _repr
from ring_jax._checks import check_array, check_count, check_flag, check_instance, check_number
from ring_jax.context import ContextParallel, ring_attention
from ring_jax.context.attention import check_divides, check_options
from ring_jax.context.strategies import StrategyName
from ring_jax.flash import flash_attention
from ring_jax.flash.backends import Implementation
from ring_jax.mask import Mask, ResolvedMask, causal, check_covers, local_window
from ring_jax.nn.placement import place_parameters
from ring_jax.nn.projections import check_projections
from ring_jax.nn.rope import apply_rope, check_positions, check_rotary


def _head_sizes(features: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """(key-value heads, size of a head), with their defaults."""
    check_count("features", features, 1)
    check_count("num_heads", num_heads, 1)
    num_kv_heads = num_heads if num_kv_heads is None else check_count("num_kv_heads", num_kv_heads, 1)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")
    if head_dim is None and features % num_heads:
        raise ValueError(f"features must divide by num_heads where head_dim is not given: {features} / {num_heads}")
    return num_kv_heads, features // num_heads if head_dim is None else check_count("head_dim", head_dim, 1)


def _check_rope(head_dim: int, rope_theta: float | None, rotary_fraction: float) -> None:
    if rope_theta is not None:
        check_number("rope_theta", rope_theta, above=0)
        check_rotary(head_dim, rope_theta, rotary_fraction)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary embedding, optional q/k norm and optional output gate.

        q, k, v = x Wq, x Wk, x Wv;   q, k = rope(norm(q)), rope(norm(k));   y = (attention(q, k, v) * sigmoid(x Wg)) Wo

    With a context, x is [B, T, D] in the order of the context's layout and attention runs over its mesh axis; without
    one, x is in natural order and attention runs through `ring_jax.flash_attention`. Parameters are the same either
    way, and `context` is a plain attribute: set it to None to read a trained model on one device.

    With the gate, ``query`` projects to [N, 2 H]: for each head first the query, then the gate, as Qwen3.5 does.

    Args:
      features: D, the model width.
      num_heads: N, query heads.
      num_kv_heads: K, key-value heads; must divide N (default: N).
      head_dim: H (default: D / N).
      is_causal: whether a token sees only itself and earlier ones.
      local_window_size: keys visible (left, right) of the query, or one number for both sides.
      rope_theta: base of the rotary wave lengths; None for no rotary embedding.
      rotary_fraction: share of the head that rotates.
      qk_norm: RMS norm over the head, before RoPE, with learned scales.
      norm_epsilon: added to the mean square in those norms.
      output_gate: multiply the attention output by the sigmoid of a projection of x.
      use_bias: whether the projections add biases.
      context: the mesh axes and the layout; None for one device.
      strategy: how to run over the context's axis (default: the context's own).
      implementation: which flash block runs (default: the best that runs here).
      dtype: of the computation (default: that of x and the parameters).
      param_dtype: of the parameters.
      precision: of the projections.
      kernel_init: initialiser of the kernels.
      rngs: for the initial parameters.

    Raises:
      ValueError: for head counts or sizes that do not fit together.

    Example:
      >>> import ring_jax
      >>> mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
      >>> layer = Attention(16, 4, num_kv_heads=2, context=cp, rngs=nnx.Rngs(0))
      >>> layer(cp.to_layout(jnp.ones((1, 7, 16))), positions=cp.positions(7), seq_len=7).shape
      (1, 8, 16)

    Sources: Ainslie et al., GQA (arXiv:2305.13245); Su et al., RoFormer (arXiv:2104.09864); Henry et al., Query-Key
    Normalization (arXiv:2010.04245); Qiu et al., Gated Attention (arXiv:2505.06708).
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        is_causal: bool = True,
        local_window_size: int | tuple[int, int] | None = None,
        rope_theta: float | None = 10_000.0,
        rotary_fraction: float = 1.0,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        output_gate: bool = False,
        use_bias: bool = False,
        context: ContextParallel | None = None,
        strategy: StrategyName | None = None,
        implementation: Implementation | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        num_kv_heads, head_dim = _head_sizes(features, num_heads, num_kv_heads, head_dim)
        chosen: Any = {"strategy": strategy, "implementation": implementation}
        check_options(is_causal=is_causal, local_window_size=local_window_size, **chosen)
        check_instance("context", context, ContextParallel, "a ring_jax.ContextParallel", optional=True)
        for name, flag in (("qk_norm", qk_norm), ("output_gate", output_gate), ("use_bias", use_bias)):
            check_flag(name, flag)
        check_number("norm_epsilon", norm_epsilon, above=0)
        _check_rope(head_dim, rope_theta, rotary_fraction)
        check_projections(dtype, param_dtype, precision, kernel_init, rngs)
        self.features, self.output_gate = features, output_gate
        self.is_causal, self.local_window_size = is_causal, local_window_size
        self.rope_theta, self.rotary_fraction = rope_theta, rotary_fraction
        self.context, self.strategy, self.implementation = context, strategy, implementation
        kernel_init = nnx.initializers.lecun_normal() if kernel_init is None else kernel_init
        dtypes: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear: Any = functools.partial(
            nnx.LinearGeneral, use_bias=use_bias, precision=precision, kernel_init=kernel_init, **dtypes
        )
        norm: Any = functools.partial(nnx.RMSNorm, head_dim, epsilon=norm_epsilon, **dtypes)
        self.query = linear(features, (num_heads, 2 * head_dim if output_gate else head_dim))
        self.key = linear(features, (num_kv_heads, head_dim))
        self.value = linear(features, (num_kv_heads, head_dim))
        self.out = linear((num_heads, head_dim), features, axis=(-2, -1))
        self.query_norm = norm() if qk_norm else None
        self.key_norm = norm() if qk_norm else None
        place_parameters(self, context)

    def __repr__(self) -> str:
        heads, size = getattr(self.out, "in_features", (None, None))
        kv_heads = getattr(self.key, "out_features", (None,))[0]
        return _repr.of_module(self, num_heads=heads, num_kv_heads=kv_heads, head_dim=size, context=self.context)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
        mask: Mask | ResolvedMask | None = None,
        seq_len: int | None = None,
    ) -> Float[Array, "B T D"]:
        """Applies the layer.

        Args:
          x: [B, T, D] in the order of the context's layout (natural order without a context).
          positions: int [T] or [B, T] for RoPE, in the order of x. Default: those of the context's layout, 0..T-1
            without one. Pass them for packed documents, whose positions start again.
          mask: which keys each query sees, beside ``is_causal`` and ``local_window_size``. One that
            ``context.resolve`` has resolved is complete: it stands for ``is_causal`` too.
          seq_len: number of real tokens where x carries padding behind them (as ``to_layout`` adds).

        Returns:
          [B, T, D]. Rows of padding hold finite values without meaning.
        """
        check_array("x", x, "B T D", {"D": self.features})
        check_options(mask=mask)
        if positions is not None and self.rope_theta is None:
            raise ValueError("positions act through rotary embedding only, and this layer has rope_theta=None")
        if positions is not None:
            check_positions(positions, x)
        length = x.shape[1]
        if self.context is not None:
            ranks = self.context.ranks(x)
            length *= ranks if self.context.is_manual else 1
            check_divides("x", length, ranks, self.context)
        if seq_len is not None:
            seq_len = check_count("seq_len", seq_len, 0, length)
        if self.context is None and (self.strategy is not None or isinstance(mask, ResolvedMask)):
            what = "a resolved mask" if self.strategy is None else f"strategy={self.strategy!r}"
            raise ValueError(f"{what} needs a context; this layer has context=None")
        bounds = self._bounds(x, mask, seq_len) if self.context is None else None
        query, key, value = self.query(x), self.key(x), self.value(x)
        gate = None
        if self.output_gate:
            query, gate = jnp.split(query, 2, axis=-1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rope_theta is not None:
            positions = self._positions(x) if positions is None else positions
            rope = functools.partial(apply_rope, theta=self.rope_theta, rotary_fraction=self.rotary_fraction)
            query, key = rope(query, positions), rope(key, positions)

        if bounds is None:
            attended = self._attend(query, key, value, mask, seq_len)
        else:
            out, _ = flash_attention(query, key, value, *bounds, implementation=self.implementation)
            attended = out.astype(query.dtype)
        if gate is not None:
            attended = attended * jax.nn.sigmoid(gate)
        return self.out(attended)

    def _positions(self, x: Array) -> Array:
        length = x.shape[1]
        if self.context is None:
            return jnp.arange(length, dtype=jnp.int32)
        return self.context.positions(length * (self.context.ranks() if self.context.is_manual else 1), like=x)

    def _attend(
        self, query: Array, key: Array, value: Array, mask: Mask | ResolvedMask | None, seq_len: int | None
    ) -> Array:
        assert self.context is not None
        out = ring_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=self.is_causal and not isinstance(mask, ResolvedMask),
            local_window_size=self.local_window_size,
            context=self.context,
            seq_len=seq_len,
            strategy=self.strategy,
            implementation=self.implementation,
        )
        assert isinstance(out, jax.Array)
        return out

    def _bounds(self, x: Array, mask: Any, seq_len: int | None) -> tuple[Array, Array]:
        """Key bounds of every query on one device, int32 [B, T]."""
        mask = Mask() if mask is None else mask
        if self.is_causal:
            mask = mask & causal()
        if self.local_window_size is not None:
            mask = mask & local_window(self.local_window_size)
        length = x.shape[1]
        real = length if seq_len is None else seq_len
        check_covers(mask, real)
        start, end = mask.interval(jnp.arange(length, dtype=jnp.int32), q_len=real, kv_len=real)
        return jnp.broadcast_to(start, x.shape[:2]), jnp.broadcast_to(end, x.shape[:2])
