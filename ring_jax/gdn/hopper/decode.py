"""Decode steps of a GDN layer on Hopper as functions of arrays: what they take, and the launch. See `decode_kernel`."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from ring_jax._checks import Sizes, check_array
from ring_jax.gdn.checks import check_operands
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.hopper import decode_kernel
from ring_jax.gdn.hopper.decode_kernel import Problem
from ring_jax.mosaic import compat, in_place

MAX_TOKENS = 8
MULTIPROCESSORS = 132
STATE_REGISTERS = 128  # of a thread, at most: as many again are needed beside them
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the state of a head is cut.

    Attributes:
        columns: of the state [dk, dv] that a warpgroup holds in registers: 32, 64 or 128.
        warpgroups: of a program. Where the output norm is fused, they must hold a whole head.
        slots: states in shared memory of a program that walks over heads, at least 3; 0 for programs with one head each. A warpgroup
            must hold a whole head.
        walkers: such programs; one fits on a multiprocessor.
    """

    columns: int
    warpgroups: int
    slots: int = 0
    walkers: int = MULTIPROCESSORS

    def __post_init__(self):
        if self.columns not in (32, 64, 128):
            raise ValueError(f"{self.columns=} must be 32, 64 or 128")
        if self.warpgroups not in (1, 2, 4):
            raise ValueError(f"{self.warpgroups=} must be 1, 2 or 4")
        if self.slots not in (0, 3, 4, 5, 6):
            raise ValueError(f"{self.slots=} must be 0 or from 3 to 6")
        if self.walkers < 1:
            raise ValueError(f"{self.walkers=} must be positive")
        if self.slots and self.warpgroups > 1:
            raise ValueError(f"a program that walks over heads has one warpgroup, got {self.warpgroups=}")


def decode_config(batch: int, value_heads: int, dk: int, dv: int, whole_heads: bool) -> DecodeConfig:
    """The config that is used for these sizes.

    Chosen on one H200 (head size 128, 16 / 32 heads, one token, jax 0.11.2, 2026-11-26), microseconds for batch 1, 32, 128.
    Everything fused: a head in one warpgroup 4.6, 38.7, 142; in two 4.7, 44.9, 175; in four 5.6, 52.4, 193. Without the output
    norm a quarter of a head in a program takes 3.3, 45.8, 173. On an H100 (2026-11-27) a head in one warpgroup 5.6, 54.3, 203.5, and
    walking over heads, which is taken from four a multiprocessor on, 55.0 and 202.6.
    """
    many = batch * value_heads >= 4 * MULTIPROCESSORS
    if whole_heads or many:
        columns = min(dv, STATE_REGISTERS * 128 // dk)
        slots = 3 if many and columns == dv else 0
        return DecodeConfig(columns=columns, warpgroups=dv // columns, slots=slots)
    return DecodeConfig(columns=32, warpgroups=1)


def unsupported_reason(
    time: int, key_size: int, value_size: int, *arrays: jax.Array, compute_capability: str | None = None
) -> str | None:
    """Why the kernels cannot take these sizes and `arrays` (all but the state), or None."""
    if compute_capability is not None and compute_capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), this is {compute_capability}"
    if not in_place.AVAILABLE:
        return f"needs jax 0.11 or later, this is {jax.__version__}"
    if not 1 <= time <= MAX_TOKENS:
        return f"takes 1 to {MAX_TOKENS} tokens at a time, got {time}"
    if key_size not in (64, 128, 256) or value_size not in (64, 128):
        return f"head sizes must be 64, 128 or 256 for keys and 64 or 128 for values, got {key_size} and {value_size}"
    for x in arrays:
        if x.dtype not in _DTYPES:
            return f"needs bfloat16, float16 or float32, got {x.dtype}"
        if 0 in x.shape:
            return f"empty arrays, got {x.shape}"
    return None


class StepWeights(NamedTuple):
    """Of a layer, or with an axis of groups in front of each.

    Fields:
        conv: filters of q, k and v. a_log, dt_bias: of the decay. norm: of the output norm, if it is to be made.
    """

    conv: tuple[Float[Array, "... W _"], Float[Array, "... W _"], Float[Array, "... W _"]]
    a_log: Float[Array, "... N"]
    dt_bias: Float[Array, "... N"]
    norm: Float[Array, "... dv"] | None = None


def recurrent(
    query: Float[Array, "B T K dk"],
    key: Float[Array, "B T K dk"],
    value: Float[Array, "B T N dv"],
    log_decay: Float32[Array, "B T N"],
    beta: Float[Array, "B T N"],
    *,
    scale: float,
    initial_state: Float32[Array, "B N dk dv"],
    config: DecodeConfig | None = None,
) -> tuple[Float[Array, "B T N dv"], Float32[Array, "B N dk dv"]]:
    """`ring_jax.gdn.recurrent` for at most `MAX_TOKENS` tokens without documents; no gradient.

    The state's own buffer is written wherever nobody else reads it.

    Raises:
        NotImplementedError: if `unsupported_reason` gives one.
        ValueError: shapes that do not fit.
    """
    check_operands(query, key, value, log_decay, beta, initial_state, None)
    (batch, time, key_heads, dk), (heads, dv) = key.shape, value.shape[2:]
    _refuse(unsupported_reason(time, dk, dv, query, key, value, log_decay, beta))
    config = config or decode_config(batch, heads, dk, dv, whole_heads=False)
    _check_config(config, dv, whole_heads=False)
    sizes = dict(batch=batch, time=time, key_heads=key_heads, value_heads=heads, dk=dk, dv=dv)
    problem = Problem(**sizes, scale=scale, width=None, norm_epsilon=None, **dataclasses.asdict(config))
    operands = (query, key, value, log_decay, beta)
    out, state = _launch(problem, operands, initial_state[None])
    return out, state[0]


def step(
    projected: Float[Array, "B T K P"],
    state: Float32[Array, "... B N dk dv"],
    tail: Float[Array, "... B _ F"],
    weights: StepWeights,
    *,
    heads: Heads,
    scale: float | None = None,
    norm_epsilon: float = 1e-6,
    at: tuple[int, int] | None = None,
    present: Bool[Array, " B"] | None = None,
    config: DecodeConfig | None = None,
) -> tuple[Float[Array, "B T N dv"], Float32[Array, "... B N dk dv"], Float[Array, "B _ F"]]:
    """A GDN layer's token mixer between its projections: one or a few tokens in one launch; no gradient.

    Args:
        projected: by key heads, as one product leaves it (`ring_jax.gdn.by_head`).
        state: float32, updated in its own buffer wherever nobody else reads it.
        tail: the last W - 1 inputs of the convolution.
        weights: as in `MixerWeights`; with those of the output norm it is made here, with z as its gate (without, z is not read).
        scale: of the query, d_k^-0.5 by default.
        at: (layer, group) where states and tails are those of several layers, stacked, and weights those of several groups:
            which of them are this layer's.
        present: rows whose tokens are real, all by default; the state and tail of the others stay as they are, bit for bit. What
            `projected` holds of them must be finite.

    Returns:
        out (normalised where there is a norm) in the dtype of `projected`, the states, and this layer's leaving tail.

    Raises:
        NotImplementedError: if `unsupported_reason` gives one.
        ValueError: shapes that do not fit.
    """
    operands: tuple[jax.Array, ...] = (tail, *weights.conv, weights.a_log, weights.dt_bias)
    operands += () if weights.norm is None else (weights.norm,)
    if at is None:
        state, *operands = (x[None] for x in (state, *operands))  # type: ignore[assignment]
    _check_step(heads, projected, state, operands, at)
    batch, time = projected.shape[:2]
    n, dk, dv = heads.value_heads, heads.key_size, heads.value_size
    _refuse(unsupported_reason(time, dk, dv, projected, *operands))
    gated = weights.norm is not None
    config = config or decode_config(batch, n, dk, dv, whole_heads=gated)
    _check_config(config, dv, whole_heads=gated)
    problem = Problem(
        batch=batch,
        time=time,
        key_heads=heads.key_heads,
        value_heads=n,
        dk=dk,
        dv=dv,
        scale=dk**-0.5 if scale is None else scale,
        width=weights.conv[0].shape[-2],
        norm_epsilon=norm_epsilon if gated else None,
        stacked=at is not None,
        present=present is not None,
        **dataclasses.asdict(config),
    )
    operands = (projected, *operands)
    if present is not None:
        check_array("present", present, "B", {"B": batch}, kind="bool")
        operands += (present.astype(jnp.int32),)
    if at is not None:
        operands += (jnp.asarray(at, jnp.int32),)
    out, leaving, states = _launch(problem, operands, state)
    return out, states if at is not None else states[0], leaving


# Layers with the same shapes are lowered and compiled once: a third of a second for each.
@functools.partial(jax.jit, static_argnums=0)
def _launch(problem: Problem, operands, states):
    like = operands[0] if problem.width is not None else operands[2]  # projections, values
    shape = problem.batch, problem.time, problem.value_heads, problem.dv
    outputs = [compat.output_like(shape, like.dtype, *operands, states)]
    if problem.width is not None:
        outputs.append(
            compat.output_like((problem.batch, problem.width - 1, problem.features), like.dtype, *operands, states)
        )
    call = compat.kernel(
        functools.partial(_body, decode_kernel.kernel, problem),
        name="gdn_decode",
        out_type=tuple(outputs),
        scratch=decode_kernel.scratch(problem),
        grid=(problem.programs,),
        grid_names=("program",),
        num_threads=problem.warpgroups,
        thread_name="warpgroup",
    )
    return in_place.update(call, outputs, operands, (states,))


def _body(kernel, problem, *refs, **scratch):
    kernel(problem, *refs, **scratch)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise NotImplementedError(f"the Hopper decode kernel {reason}")


def _check_config(config: DecodeConfig, dv: int, whole_heads: bool) -> None:
    held, whole_heads = config.columns * config.warpgroups, whole_heads or config.slots > 0
    if dv % held or (whole_heads and dv != held):
        raise ValueError(f"{config} does not fit a value head of {dv}" + (" as a whole" if whole_heads else ""))


def _check_step(heads: Heads, projected, states, operands, at) -> None:
    """`operands`: tail, three filters, a_log, dt_bias, perhaps the norm's weight; all stacked."""
    tail, *filters, a_log, dt_bias = operands[:6]
    norm = operands[6:]
    keys, _, values = heads.parts
    sizes = Sizes(N=heads.value_heads, dk=heads.key_size, dv=heads.value_size, F=heads.features)
    check_array("projected", projected, f"B T {heads.key_heads} {heads.stride}", sizes, advice="as `by_head` has it")
    for name, x, size in zip(("q", "k", "v"), filters, (keys, keys, values), strict=True):
        check_array(f"the filter of {name}", x, f"G W {size}", sizes)
    sizes["W-1"] = sizes["W"] - 1
    check_array("a_log", a_log, "G N", sizes)
    check_array("dt_bias", dt_bias, "G N", sizes)
    if norm:
        check_array("the norm's weight", norm[0], "G dv", sizes)
    check_array("state", states, "L B N dk dv", sizes)
    check_array("tail", tail, "L B W-1 F", sizes, advice="the last W - 1 inputs")
    if states.dtype != jnp.float32:
        raise ValueError(f"state must be float32, got {states.dtype}: states are never rounded")
    if tail.dtype != projected.dtype:
        raise ValueError(f"tail must be {projected.dtype} like the inputs, got {tail.dtype}: it holds inputs")
    if at is not None and not (0 <= at[0] < sizes["L"] and 0 <= at[1] < sizes["G"]):
        raise ValueError(f"at must be one of {sizes['L']} layers and one of {sizes['G']} groups, got {at}")
