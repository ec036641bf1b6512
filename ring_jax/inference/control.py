"""What the host says of each row before a decode; it travels as one int32 array [R, COLUMNS]."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from ring_jax.inference.operations import Member
from ring_jax.inference.sampling import RowSampling, Sampling

STOPS = 16  # tokens that end a row on the device; more are looked for on the host
_FIXED = 11
COLUMNS = _FIXED + STOPS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Control:
    """The rows' parts.

    Fields:
        member: whether the row takes part; it rests otherwise. enters: begins with `token` at `position`, where it does.
        limit: tokens of the whole text. stops: -1 for none.
    """

    member: Any
    enters: Any
    token: Any
    position: Any
    limit: Any
    sampling: RowSampling
    stops: Any

    @classmethod
    def of(cls, packed: Int[Array, "R columns"]) -> Control:
        flag = lambda i: packed[:, i] != 0  # noqa: E731
        number = lambda i, dtype: lax.bitcast_convert_type(packed[:, i], dtype)  # noqa: E731
        seed = jnp.stack([number(8, jnp.uint32), number(9, jnp.uint32)], axis=1)
        how = RowSampling(number(5, jnp.float32), packed[:, 6], number(7, jnp.float32), seed, packed[:, 10])
        return cls(flag(0), flag(1), packed[:, 2], packed[:, 3], packed[:, 4], how, packed[:, _FIXED:])


def pack(member: Member, how: Sampling, seed: int, top: int) -> np.ndarray:
    """The row of a member that enters."""
    text = member.text
    bits = lambda x: struct.unpack("<i", struct.pack("<f", x))[0]  # noqa: E731
    half = lambda x: struct.unpack("<i", struct.pack("<I", x & 0xFFFFFFFF))[0]  # noqa: E731
    packed = np.full(COLUMNS, -1, np.int32)
    packed[:_FIXED] = (
        1, 1, member.token, member.position, text.limit, bits(how.temperature), how.top_k or 0, bits(how.top_p),
        half(seed >> 32), half(seed), top,
    )  # fmt: skip
    watched = sorted(text.stops)[:STOPS]
    packed[_FIXED : _FIXED + len(watched)] = watched
    return packed
