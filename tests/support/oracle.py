"""Float64 NumPy attention with hand-written gradients: shares no code and no tricks with the library."""

import numpy as np


def attention(q, k, v, visible, *, scale, cap=None, sinks=None, dout=None, dlse=None):
    """out, lse and, given cotangents, dq, dk, dv, dsinks. visible: bool [B, T, S]. Empty rows: 0 and -inf (or the sink)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, _ = q.shape
    K = k.shape[2]
    G = N // K
    kk, vv = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)
    s = np.einsum("btnh,bsnh->bnts", q, kk) * scale
    capped = cap * np.tanh(s / cap) if cap else s
    masked = np.where(visible[:, None], capped, -np.inf)
    sink = np.full(N, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    column = np.broadcast_to(sink[None, :, None, None], (B, N, T, 1))
    top = np.maximum(masked.max(-1, keepdims=True, initial=-np.inf), column)
    top = np.where(np.isneginf(top), 0, top)
    total = np.exp(masked - top).sum(-1, keepdims=True) + np.exp(column - top)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    p = np.where(np.isneginf(lse), 0, np.exp(masked - np.where(np.isneginf(lse), 0, lse)))
    out = np.einsum("bnts,bsnh->btnh", p, vv)
    result = {"out": out, "lse": np.moveaxis(lse[..., 0], 1, 2)}
    if dout is None:
        return result
    dout, dlse = np.asarray(dout, np.float64), np.asarray(dlse, np.float64)
    rows = np.moveaxis(dlse, 2, 1)[..., None]
    delta = np.moveaxis((dout * out).sum(-1), 2, 1)[..., None]
    dcapped = p * (np.einsum("btnh,bsnh->bnts", dout, vv) - delta + rows)
    ds = dcapped * (1 - (capped / cap) ** 2) if cap else dcapped
    grouped = (*k.shape[:2], K, G, -1)
    result["dq"] = scale * np.einsum("bnts,bsnh->btnh", ds, kk)
    result["dk"] = scale * np.einsum("bnts,btnh->bsnh", ds, q).reshape(grouped).sum(3)
    result["dv"] = np.einsum("bnts,btnh->bsnh", p, dout).reshape(grouped).sum(3)
    if sinks is not None:
        share = np.exp(column - np.where(np.isneginf(lse), 0, lse))
        result["dsinks"] = (share * (rows - delta)).sum((0, 2, 3))
    return result


def relative(got, want) -> float:
    """Relative L2 error; infinities must agree in place."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{got.shape} is not {want.shape}"
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    got, want = (np.where(np.isneginf(x), 0, x) for x in (got, want))
    assert np.all(np.isfinite(got))
    norm = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / norm) if norm else float(np.linalg.norm(got))


def assert_close(got: dict, want: dict, tolerance: float) -> None:
    """Every entry of `got` within `tolerance` (relative L2) of `want`."""
    errors = {name: relative(got[name], want[name]) for name in got}
    assert all(e <= tolerance for e in errors.values()), f"{errors} exceed {tolerance}"
