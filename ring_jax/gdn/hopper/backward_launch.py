"""The Hopper backward of the gated delta rule as functions of arrays: padding, its kernels, and what remains for XLA.

prepared = prepare(operands, out_gradient, ...)
gradients(prepared, initial_state, last)     of everything, with that of the final state
entering_gradient(prepared)                  of the initial state alone, where nothing follows: for states that pass on
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from ring_jax.gdn.hopper import gradient_kernel, recurrence_kernel
from ring_jax.gdn.hopper.config import CHUNK, ForwardConfig
from ring_jax.gdn.hopper.gates import document_spans
from ring_jax.gdn.hopper.launch import lengthened, prepared
from ring_jax.gdn.segments import blank_padding

CONFIG = ForwardConfig(state_warpgroups=1, state_registers=240)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the kernels of the backward read.

    Fields:
        operands: query, key, value, log_decay, beta, as `launch.forward` takes them.
        arrays: those that TMA reads, lengthened, the gradient of the output the last of them; inverse, gates, starts of documents.
        shared: what both kernels' problems say.
    """

    operands: tuple[jax.Array, ...]
    segment_ids: jax.Array | None
    arrays: tuple[Any, ...]
    shared: dict[str, Any]

    def recurrences(self, initial: jax.Array, last: jax.Array, **changes: Any) -> Any:
        """`recurrence_kernel.recurrences`; the states [B, N, dk, dv]."""
        query, key, value, out_gradient, inverse, gates, starts = self.arrays
        problem = recurrence_kernel.Problem(
            time=key.shape[1], heads=value.shape[2], config=CONFIG, **self.shared, **changes
        )
        states = (jnp.swapaxes(x.astype(jnp.float32), 2, 3) for x in (initial, last))
        return recurrence_kernel.recurrences(problem, query, key, value, out_gradient, inverse, gates, starts, *states)

    def no_state(self) -> jax.Array:
        key, value = self.operands[1:3]
        return jnp.zeros((key.shape[0], value.shape[2], key.shape[3], value.shape[3]), jnp.float32)


def prepare(operands: Any, out_gradient: jax.Array, *, scale: float, segment_ids: jax.Array | None) -> Prepared:
    """From the operands of `launch.forward` and the gradient of its output."""
    (out_gradient,) = blank_padding(segment_ids, out_gradient.astype(operands[2].dtype))
    *arrays, inverse, gates, starts = prepared(*operands, segment_ids, backward=True)
    key, value = arrays[1:]
    shared = dict(
        batch=key.shape[0],
        key_heads=key.shape[2],
        key_size=key.shape[3],
        value_size=value.shape[3],
        scale=float(scale),
        documents=starts is not None,
        dtype=jnp.dtype(key.dtype),
    )
    arrays = (*arrays, lengthened(out_gradient), inverse, gates, starts)
    return Prepared(tuple(operands), segment_ids, arrays, shared)


def entering_gradient(prepared: Prepared) -> jax.Array:
    """Of the initial state, [B, N, dk, dv] float32, where the final state goes nowhere."""
    nothing = prepared.no_state()
    return jnp.swapaxes(prepared.recurrences(nothing, nothing, only_gradient=True), 2, 3)


def gradients(prepared: Prepared, initial_state: jax.Array | None, last: jax.Array) -> tuple[jax.Array, ...]:
    """Of the operands in their dtypes, and of the initial state (float32 [B, N, dk, dv]), given or not; `last` is the gradient of
    the final state."""
    *_, original, log_decay, beta = prepared.operands
    batch, time, heads, _ = original.shape
    query, key, _, out_gradient, _, gates, starts = prepared.arrays
    initial = prepared.no_state() if initial_state is None else initial_state
    states, z, ends, dv, state_gradient = prepared.recurrences(initial, last)
    problem = gradient_kernel.Problem(chunks=pl.cdiv(time, CHUNK), group=heads // key.shape[2], **prepared.shared)
    spans = None if starts is None else document_spans(starts)
    dq, dk, rows = gradient_kernel.gradients(problem, query, key, out_gradient, z, dv, states, ends, gates, spans)
    narrow = gradient_kernel.decay_gradient(rows, gates)
    narrow = (jnp.moveaxis(x.reshape(batch, heads, -1)[:, :, :time], 1, 2) for x in narrow)
    narrow = blank_padding(prepared.segment_ids, *narrow)
    found = [x[:, :time] for x in (dq, dk, dv)]
    found += [x.astype(y.dtype) for x, y in zip(narrow, (log_decay, beta), strict=True)]
    return (*found, jnp.swapaxes(state_gradient, 2, 3))


def backward(operands, cotangents, *, scale: float, initial_state: jax.Array | None, segment_ids: jax.Array | None):
    """Gradients of `launch.forward`, from those of its two results: as `gradients`."""
    return gradients(
        prepare(operands, cotangents[0], scale=scale, segment_ids=segment_ids), initial_state, cotangents[1]
    )
