"""The experts' products, block by block: cost and memory of the assignments, whatever the number of experts.

    y_t = sum over the experts e of token t here:  w_te  W_down[e]^T ( silu(W_gate[e]^T x_t) * W_up[e]^T x_t )

`jax.lax.ragged_dot` would be the operation of choice, but XLA expands it (jax 0.10 to 0.12): on CPUs always, on CUDA
unless an experimental flag is set, and its weight gradients always, to a dense product with an operand that is masked
once per expert. That is E times the arithmetic and E times the memory. Here a loop walks the blocks of `moe.blocks`,
picks the weights of each block's expert, and adds the rows to the tokens that they belong to. Nothing of k times the
size of x is ever held: the backward pass gathers the rows again and repeats the first product.

The loop has as many steps as the routing needs (a dynamic bound, hence the derivative rule). One step takes one block
on CPUs; on GPUs several, as batched products, since a step there costs a synchronisation with the host.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ring_jax._vma import align
from ring_jax.moe.blocks import Blocks, Chunk

T = TypeVar("T")

# On GPUs, the weights of the blocks of one step are copied to lie together: so many bytes of them.
_WEIGHT_BYTES = 256 * 2**20
_MOST_BLOCKS = 16


def blocks_per_step(gate_up: jax.Array, platform: str) -> int:
    """Blocks that one step of the loop takes."""
    if platform == "cpu":
        return 1
    expert_bytes = 3 * gate_up[0].size // 2 * gate_up.dtype.itemsize
    return min(max(_WEIGHT_BYTES // max(expert_bytes, 1), 1), _MOST_BLOCKS)


def run_experts(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array, blocks: Blocks, step: int
) -> jax.Array:
    """Weighted sums of the experts' outputs.

    Args:
        x: [T, D]. gate_up: [E, D, 2, F], gate first. down: [E, F, D]. All of one dtype.
        weights: [T, k], of float32 or wider.
        blocks: of the T x k assignments to these E experts, its capacity a multiple of `step`.
        step: blocks that one step of the loop takes.

    Returns:
        y [T, D] in the dtype of `weights`: zero for tokens without an expert here.
    """
    x, gate_up, down, weights, blocks = align(x, gate_up, down, weights, blocks)
    fused = gate_up.reshape(*gate_up.shape[:2], -1)
    return _run(step, x, fused, down, weights, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(step: int, x: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array, blocks: Blocks) -> jax.Array:
    def body(index: jax.Array, y: jax.Array) -> jax.Array:
        chunk = blocks.chunk(index, step, x.shape[0])
        rows, w = _rows(x, chunk.tokens), _rows(weights.reshape(-1), chunk.assignments)
        gate, up = _gate_and_up(rows, _pick(gate_up, chunk), w.dtype)
        hidden = (jax.nn.silu(gate) * up * w[..., None]).astype(x.dtype)
        out = _product("cbf,cfd->cbd", hidden, _pick(down, chunk), w.dtype)
        return _add_rows(y, chunk, out)

    return _loop(blocks, step, body, _zeros_like(x, weights.dtype))


def _forward(step: int, *operands: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _run(step, *operands), operands


def _backward(step: int, operands: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
    x, gate_up, down, weights, blocks = operands
    wide = weights.dtype

    def body(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dx, dgate_up, ddown, dweights = sums
        chunk = blocks.chunk(index, step, x.shape[0])
        rows, w = _rows(x, chunk.tokens), _rows(weights.reshape(-1), chunk.assignments)[..., None]
        kernel_in, kernel_out = _pick(gate_up, chunk), _pick(down, chunk)
        gate, up = _gate_and_up(rows, kernel_in, wide)
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        dout = _rows(dy, chunk.tokens).astype(x.dtype)
        dscaled = _product("cbd,cfd->cbf", dout, kernel_out, wide)  # gradient of w * hidden
        dweights = _add_entries(dweights, chunk, (dscaled * hidden).sum(axis=-1))
        dhidden = dscaled * w
        dgate = dhidden * up * (sigmoid + silu * (1 - sigmoid))
        din = jnp.concatenate([dgate, dhidden * silu], axis=-1).astype(x.dtype)
        dx = _add_rows(dx, chunk, _product("cbf,cdf->cbd", din, kernel_in, wide))
        dgate_up = _add_experts(dgate_up, chunk, _product("cbd,cbf->cdf", rows, din, wide))
        ddown = _add_experts(ddown, chunk, _product("cbf,cbd->cfd", (hidden * w).astype(x.dtype), dout, wide))
        return dx, dgate_up, ddown, dweights

    sums = [_zeros_like(a, wide) for a in (x, gate_up, down, weights.reshape(-1))]
    dx, dgate_up, ddown, dweights = _loop(blocks, step, body, tuple(sums))
    return (
        dx.astype(x.dtype),
        dgate_up.astype(gate_up.dtype),
        ddown.astype(down.dtype),
        dweights.reshape(weights.shape),
        None,
    )


_run.defvjp(_forward, _backward)


def _loop(blocks: Blocks, step: int, body: Callable[[jax.Array, T], T], carry: T) -> T:
    steps = blocks.experts.shape[0] // step
    if steps <= 1:
        return body(jnp.zeros((), jnp.int32), carry) if steps else carry
    return lax.fori_loop(jnp.zeros((), jnp.int32), -(-blocks.count // step), body, carry)


def _product(equation: str, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


def _gate_and_up(rows: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
    return jnp.split(_product("cbd,cdf->cbf", rows, kernel, dtype), 2, axis=-1)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Entries of x along its first axis, zero beyond the end: what padding holds reaches nothing."""
    return x.at[index].get(mode="fill", fill_value=0)


def _pick(kernels: jax.Array, chunk: Chunk) -> jax.Array:
    """The kernels [c, ...] of a chunk's experts."""
    if chunk.experts.shape[0] == 1:
        return lax.dynamic_index_in_dim(kernels, chunk.experts[0], keepdims=True)
    return kernels.at[chunk.experts].get(mode="promise_in_bounds")


def _add_rows(y: jax.Array, chunk: Chunk, out: jax.Array) -> jax.Array:
    # Block by block: the tokens of one expert differ, so no two rows collide and the order of sums is fixed.
    for tokens, rows in zip(chunk.tokens, out, strict=True):
        y = y.at[tokens].add(rows, mode="drop", unique_indices=True)
    return y


def _add_entries(y: jax.Array, chunk: Chunk, out: jax.Array) -> jax.Array:
    for assignments, entries in zip(chunk.assignments, out, strict=True):
        y = y.at[assignments].add(entries, mode="drop", unique_indices=True)
    return y


def _add_experts(sums: jax.Array, chunk: Chunk, out: jax.Array) -> jax.Array:
    for j in range(out.shape[0]):
        expert = chunk.experts[j]
        here = lax.dynamic_index_in_dim(sums, expert, keepdims=False)
        sums = lax.dynamic_update_index_in_dim(sums, here + out[j], expert, 0)
    return sums


def _zeros_like(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return jnp.zeros_like(x, dtype=dtype)
