"""`gated_delta_rule`: the operation, on one device or over a context-parallel mesh axis."""

from typing import Any

from jaxtyping import Array, Float, Int

from ring_jax._checks import check_choice, renamed_arguments
from ring_jax.context.parallel import ContextParallel
from ring_jax.gdn import segments
from ring_jax.gdn.backends import exact
from ring_jax.gdn.checks import check_operands, check_segments
from ring_jax.gdn.cost import STRATEGIES
from ring_jax.gdn.rule import check_options, delta_rule
from ring_jax.gdn.sharded import rule_over_ranks


@renamed_arguments(way="strategy")
def gated_delta_rule(
    query: Float[Array, "B T K dk"],
    key: Float[Array, "B T K dk"],
    value: Float[Array, "B T N dv"],
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B N dk dv"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    precision: str | None = None,
    context: ContextParallel | None = None,
    strategy: str = "auto",
    seq_len: int | None = None,
) -> tuple[Float[Array, "B T N dv"], Float[Array, "B N dk dv"]]:
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
        implementation: "mosaic" (Hopper kernels, bfloat16 and float16, head sizes 64 and 128), "mosaic_split" (the same with
            float32 arithmetic), "chunked" (sequences), "recurrent" (one or a few tokens) or "reference" (token by token, for
            tests); None takes the best that runs here.
        precision: "default": 16-bit inputs may be multiplied as they are, with states and corrections rounded to 16 bits before
            products (relative error about 3e-3); "highest": float32 arithmetic whatever the inputs, on Hopper GPUs by
            "mosaic_split": it splits operands into two of 16 bits each (relative error about 5e-6; eight times the time, and 16 KiB
            of memory a token and 32 value heads; gradients by "chunked"), elsewhere by float32 products (on a GPU 30 to 40 times
            the time). None is "default".
        context: the mesh axes and the layout that the arrays lie in, for a sequence that is spread over ranks; the
            state is then the same on all context ranks, before and after.
        strategy: with a context: "batch", "head", "state" or "auto" (see `ring_jax.gdn.sharded`, also for running whole
            layers so).
        seq_len: real length where `to_layout` padded; the rest is padding, whatever it holds. Not needed for arrays whose
            padding is zeros, as `to_layout` leaves it, without segment ids: zeros leave the state untouched.

    Returns:
        out in value's dtype, and the state after the last valid token in float32 (float64 for float64 inputs).
        All arithmetic is float32 at highest precision, but for "mosaic": 16-bit operands with float32 accumulation and state,
        forward and backward (relative error about 3e-3).

    Raises:
        TypeError: what is no array, number or name.
        NotImplementedError: a named implementation that cannot run here.
        ValueError: shapes or dtypes that do not fit, an unknown implementation, a strategy without a context or one that the
            layout or the number of heads does not allow, a positive log_decay (of NumPy: a device's is not read).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> k = jnp.full((1, 100, 2, 16), 0.25); v = jnp.ones((1, 100, 4, 8)); g = jnp.full((1, 100, 4), -0.1)
        >>> out, state = gated_delta_rule(k, k, v, g, jnp.full((1, 100, 4), 0.5))
        >>> out.shape, state.shape
        ((1, 100, 4, 8), (1, 4, 16, 8))

    Source: Yang, Kautz, Hatamizadeh, Gated Delta Networks (arXiv 2412.06464); Qwen3-Next and Qwen3.5 use it so.
    """
    scale = check_options(scale, implementation)
    check_choice("strategy", strategy, ("auto", *STRATEGIES))
    check_choice("precision", precision, ("default", "highest"), optional=True)
    operands = query, key, value, log_decay, beta
    if precision == "highest":
        check_operands(*operands, initial_state, segment_ids, natural=False)
        implementation = exact(implementation, query, key, value)
    options: Any = {"initial_state": initial_state, "scale": scale, "implementation": implementation}
    if context is not None:
        return rule_over_ranks(
            operands, context=context, strategy=strategy, segment_ids=segment_ids, seq_len=seq_len, **options
        )
    if strategy != "auto":
        raise ValueError(f"strategy={strategy!r} is how a sequence is spread over ranks: it needs a context")
    if seq_len is not None:
        check_operands(*operands, initial_state, segment_ids, natural=False)
        batch, time = key.shape[:2]
        segment_ids = segments.beyond(segment_ids, seq_len, batch, time)
        check_segments(segment_ids, batch, time)
    return delta_rule(*operands, segment_ids=segment_ids, **options)
