"""Mask cases with an independent, dense definition of each: visible(b, query position, key position)."""

import numpy as np

import ring_jax

B, S = 2, 45
_IDS = np.concatenate([np.full(7, 5), np.full(3, -1), np.full(1, 2), np.full(20, 9), np.full(10, 0), np.full(4, -7)])
_CU = np.array([0, 6, 6, 7, 23, 40])
_LENGTHS = np.array([45, 31])
_LEFT = np.array([0, 9])


def _grid(T, S, offset=0):
    return np.arange(T)[None, :, None] + np.reshape(offset, (-1, 1, 1)), np.arange(S)[None, None, :]


def _documents(cu, p, s):
    return (np.searchsorted(cu, p, "right") == np.searchsorted(cu, s, "right")) & (s < cu[-1]) & (s >= cu[0])


def cases() -> dict:
    """name -> (Mask, dense bool [B, S, S])."""
    p, s = _grid(S, S)
    same_id = (_IDS[p] == _IDS[s]) & (_IDS[p] >= 0)
    valid, left = _LENGTHS[:, None, None], _LEFT[:, None, None]
    dense = {
        "full": (ring_jax.Mask(), np.ones((1, S, S), bool)),
        "causal": (ring_jax.causal(), s <= p),
        "window": (ring_jax.window(4, 2), (s >= p - 4) & (s <= p + 2)),
        "causal window": (ring_jax.causal() & ring_jax.window(5, 5), (s <= p) & (s >= p - 5)),
        "cu_seqlens": (ring_jax.documents(cu_seqlens=_CU), _documents(_CU, p, s)),
        "causal cu_seqlens": (ring_jax.causal() & ring_jax.documents(cu_seqlens=_CU), _documents(_CU, p, s) & (s <= p)),
        "segment_ids": (ring_jax.documents(segment_ids=_IDS), same_id),
        "causal segment_ids window": (
            ring_jax.causal() & ring_jax.documents(segment_ids=_IDS) & ring_jax.window(6),
            same_id & (s <= p) & (s >= p - 6),
        ),
        "lengths": (ring_jax.lengths(_LENGTHS, _LENGTHS), (p < valid) & (s < valid)),
        "causal left padding": (
            ring_jax.causal() & ring_jax.lengths(left_padding=_LEFT),
            (p >= left) & (s >= left) & (s <= p),
        ),
        "prefix": (ring_jax.prefix(np.array([11, 0])), (s <= p) | (s < np.array([11, 0])[:, None, None])),
        "nothing": (ring_jax.lengths(kv=0), np.zeros((1, S, S), bool)),
    }
    return {name: (mask, np.broadcast_to(visible, (B, S, S))) for name, (mask, visible) in dense.items()}
