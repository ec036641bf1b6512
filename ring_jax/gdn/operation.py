"""The public gated delta rule: checks, defaults, and the choice of an implementation."""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from ring_jax._checks import check_choice, check_number
from ring_jax.gdn import segments
from ring_jax.gdn.backends import BACKENDS, Backend, select
from ring_jax.gdn.checks import check_operands, check_segments, state_dtype
from ring_jax.gdn.segments import blank_padding

if TYPE_CHECKING:
    from ring_jax.context import ContextParallel

WAYS = ("batch", "head", "state")  # to spread a sequence over ranks, see `ring_jax.gdn.context`


def check_options(scale, implementation, way) -> float | None:
    """Raises unless these are what a gated delta rule can be asked for; `scale` as a Python float."""
    if scale is not None:
        scale = check_number("scale", scale, advice="multiply a traced scale into the query instead")
    check_choice("implementation", implementation, sorted(BACKENDS), optional=True)
    check_choice("way", way, ("auto", *WAYS))
    return scale


def gated_delta_rule(
    query: Float[Array, "B T K dk"],
    key: Float[Array, "B T K dk"],
    value: Float[Array, "B T N dv"],
    log_decay: Float32[Array, "B T N"],
    beta: Float[Array, "B T N"],
    *,
    scale: float | None = None,
    initial_state: Float32[Array, "B N dk dv"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    context: "ContextParallel | None" = None,
    way: str = "auto",
    seq_len: int | None = None,
) -> tuple[Float[Array, "B T N dv"], Float32[Array, "B N dk dv"]]:
    """Linear attention with a decaying state that is corrected, not only added to (gated delta rule).

    For every value head, with S = 0 or `initial_state` before the first token:

        S <- exp(log_decay_t) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   out_t = scale S^T q_t

    Args:
        query, key: float32, bfloat16 or float16 (float64 where x64 is on); key head h serves the value heads
            h*r ... h*r + r - 1, r = N / K. Not normalised here: models that use the l2 norm apply it first.
        value: same dtypes, N a multiple of K. Any T, no multiple of a chunk needed.
        log_decay: natural logarithm of the decay, float32, <= 0 and finite (-15 or -100 is fine, -inf is not:
            mark document borders with `segment_ids`).
        beta: write strength, usually in (0, 1).
        scale: factor on the query, d_k^-0.5 by default.
        initial_state: float32, continues the first document of each row.
        segment_ids: ids of packed documents, each one contiguous run, as in `ring_jax.documents`; the state is exactly
            zero where a document begins. Negative ids are padding: it ends a document, leaves the state untouched and
            gives zeros, whatever the other arrays hold there.
        implementation: "mosaic" (Hopper kernels, bfloat16 and float16, head sizes 64 and 128), "chunked" (sequences),
            "recurrent" (one or a few tokens) or "reference" (token by token, for tests); None takes the best that runs here.
        context: the mesh axes and the layout that the arrays lie in, for a sequence that is spread over ranks; the
            state is then the same on all context ranks, before and after.
        way: with a context: "batch", "head", "state" or "auto" (see `ring_jax.gdn.context`, also for running whole
            layers so).
        seq_len: real length where `to_layout` padded; the rest is padding, whatever it holds. Not needed for arrays whose
            padding is zeros, as `to_layout` leaves it, without segment ids: zeros leave the state untouched.

    Returns:
        out in value's dtype, and the state after the last valid token in float32 (float64 for float64 inputs).
        All arithmetic is float32 at highest precision, but for "mosaic": 16-bit operands with float32 accumulation and state
        (relative error about 3e-3); its gradients are those of "chunked".

    Raises:
        TypeError: what is no array, number or name.
        ValueError: shapes or dtypes that do not fit, an unknown implementation, a way without a context or one that the
            layout or the number of heads does not allow, a positive log_decay (of NumPy: a device's is not read).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> k = jnp.full((1, 100, 2, 16), 0.25); v = jnp.ones((1, 100, 4, 8)); g = jnp.full((1, 100, 4), -0.1)
        >>> out, state = gated_delta_rule(k, k, v, g, jnp.full((1, 100, 4), 0.5))
        >>> out.shape, state.shape
        ((1, 100, 4, 8), (1, 4, 16, 8))

    Source: Yang, Kautz, Hatamizadeh, Gated Delta Networks (arXiv 2412.06464); Qwen3-Next and Qwen3.5 use it so.
    """
    scale = check_options(scale, implementation, way)
    if context is not None:
        from ring_jax.gdn.context import gated_delta_rule_across  # it stands on this module

        return gated_delta_rule_across(
            (query, key, value, log_decay, beta),
            context=context,
            way=way,
            initial_state=initial_state,
            segment_ids=segment_ids,
            scale=scale,
            implementation=implementation,
            seq_len=seq_len,
        )
    if way != "auto":
        raise ValueError(f"way={way!r} is how a sequence is spread over ranks: it needs a context")
    check_operands(query, key, value, log_decay, beta, initial_state, segment_ids, natural=seq_len is None)
    batch, time, _, dk = key.shape
    heads, dv = value.shape[2:]
    backend = select(implementation, query, key, value)
    if seq_len is not None:
        segment_ids = segments.beyond(segment_ids, seq_len, batch, time)
        check_segments(segment_ids, batch, time)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, dk, dv), state_dtype(query, key, value, log_decay, beta))
    if 0 in value.shape or dk == 0:
        return jnp.zeros_like(value), initial_state
    scale = dk**-0.5 if scale is None else scale
    return _rule(backend, float(scale), (query, key, value, log_decay, beta), initial_state, segment_ids)


# Called eagerly its scans would compile at every call.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _rule(backend: Backend, scale: float, operands, initial_state, segment_ids):
    operands = blank_padding(segment_ids, *operands)
    with jax.named_scope(f"gated_delta_rule_{backend.name}"):
        return backend.run(*operands, scale=scale, initial_state=initial_state, segment_ids=segment_ids)
