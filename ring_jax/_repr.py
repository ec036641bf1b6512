"""Short reprs, and layouts and masks drawn as text.

A notebook shows the repr of whatever a cell ends with, and the values of a cache are thousands of lines: arrays appear by
dtype and shape, fields that have their default are left out.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

_SHOWN = 4  # entries of a long tuple
_RUNS = 6  # runs of positions that a rank's line shows
_ROWS, _COLUMNS = 32, 64  # cells of a drawn mask


def short(value: Any) -> str:
    """The repr of a field: arrays as ``float32[2,300]`` (one known number as itself), meshes as ``Mesh(context=8)``."""
    if isinstance(value, np.ndarray) and value.size == 1 and value.ndim < 2:
        return str(value.item())
    if isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, (Mesh, AbstractMesh)):
        explicit = " Explicit" if AxisType.Explicit in value.axis_types else ""
        return f"Mesh({', '.join(f'{name}={size}' for name, size in value.shape.items())}{explicit})"
    if type(value) is tuple and len(value) > _SHOWN:
        return f"({', '.join(map(short, value[:_SHOWN]))}, ... {len(value)} in all)"
    return repr(value)


def figure(x: float) -> str:
    """A number with three digits or more, never as a power of ten."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def call(name: str, **fields: Any) -> str:
    """``name(field=value, ...)`` without the fields that are None."""
    return f"{name}({', '.join(f'{key}={short(value)}' for key, value in fields.items() if value is not None)})"


def of_fields(self: Any) -> str:
    """The `__repr__` of a dataclass: its fields but those that have their default."""
    shown = []
    for field in dataclasses.fields(self):
        value, default = getattr(self, field.name), field.default
        if field.repr and not (value is default or (isinstance(value, (str, int, float, tuple)) and value == default)):
            shown.append(f"{field.name}={short(value)}")
    return f"{type(self).__name__}({', '.join(shown)})"


def of_module(self: Any, **fields: Any) -> str:
    """The repr of a Flax nnx module: `fields` but those that are None, and the number of its parameters."""
    from flax import nnx  # imported only by those who use it

    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(self, nnx.Param)))
    shown = [f"{key}={short(value)}" for key, value in fields.items() if value is not None]
    return f"{type(self).__name__}({', '.join([*shown, f'{count:,} parameters'])})"


def draw_layout(layout: Any, seq_len: int, ranks: int) -> str:
    """Which positions each rank holds, a line each, in the order in which they lie there."""
    length = layout.padded_length(seq_len, ranks)
    padding = f", padded to {length}" if length != seq_len else ""
    lines = [f"{layout} over {ranks} rank{'s' * (ranks > 1)}, {seq_len} positions{padding}"]
    for rank in range(ranks):
        held = np.asarray(layout.positions(rank, length, ranks))
        starts = np.flatnonzero(np.append(True, np.diff(held) != 1)) if held.size else np.zeros(0, int)
        ends = np.append(starts[1:], held.size)[: starts.size]
        runs = [
            f"{a}-{b}" if a != b else f"{a}" for a, b in zip(held[starts[:_RUNS]], held[ends[:_RUNS] - 1], strict=True)
        ]
        more = [f"... {starts.size} runs"] if starts.size > _RUNS else []
        lines.append(f"rank {rank}: {' '.join(runs + more)}")
    return "\n".join(lines)


def draw_mask(start: np.ndarray, end: np.ndarray, kv_len: int) -> str:
    """Key bounds of queries as a matrix: a line for each query, ``#`` a key that it sees, ``.`` one that it does not.

    A long sequence is drawn in cells of several queries and keys, ``+`` where only some of their pairs are seen.
    """
    rows, columns = min(len(start), _ROWS), min(kv_len, _COLUMNS)
    at = np.linspace(0, len(start), rows + 1).astype(int)
    low, high = (np.linspace(0, kv_len, columns + 1).astype(int)[i : columns + i] for i in (0, 1))
    lines = []
    for first, last in zip(at[:-1], at[1:], strict=True):
        first_key, after = start[first:last, None], end[first:last, None]
        seen = np.clip(np.minimum(after, high) - np.maximum(first_key, low), 0, None).sum(axis=0)
        whole = (last - first) * (high - low)
        lines.append("".join("." if n == 0 else "#" if n == m else "+" for n, m in zip(seen, whole, strict=True)))
    return "\n".join(lines)
