"""Runs a strategy on emulated devices and compares with the float64 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import ring_jax
from ring_jax.layout import as_layout
from ring_jax.mask import ResolvedMask
from tests.support import oracle


def inputs(B, T, S, N, K, H, Hv=None, seed=0):
    """float32 NumPy arrays by name."""
    rng = np.random.default_rng(seed)
    Hv = Hv or H
    shapes = {
        "query": (B, T, N, H),
        "key": (B, S, K, H),
        "value": (B, S, K, Hv),
        "dout": (B, T, N, Hv),
        "dlse": (B, T, N),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | {
        "sinks": rng.normal(size=N).astype(np.float32)
    }


def lay_out(x, layout, ranks, axis=1, fill=3):
    """NumPy to_layout by explicit positions, independent of the library's resharding. Padding holds junk."""
    layout = as_layout(layout)
    length = layout.padded_length(x.shape[axis], ranks)
    order = np.concatenate([layout.positions(r, length, ranks) for r in range(ranks)])
    pad = [(0, length - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
    return np.take(np.pad(x, pad, constant_values=fill), order, axis=axis), order


def natural(x, order, length, axis=1):
    return np.take(np.asarray(x), np.argsort(order), axis=axis).take(range(length), axis=axis)


@functools.partial(
    jax.jit, static_argnames=("context", "strategy", "seq_len", "kv_len", "cap", "gradients", "implementation")
)
def _run(x, mask, *, context, strategy, seq_len, kv_len, cap, gradients, implementation):
    def f(query, key, value, sinks):
        return ring_jax.ring_attention(
            query, key, value, mask=mask, sinks=sinks, scale=0.3, context=context, seq_len=seq_len, key_value_seq_len=kv_len,
            strategy=strategy, logits_soft_cap=cap, return_residual=True, implementation=implementation,
        )  # fmt: skip

    args = (x["query"], x["key"], x["value"], x["sinks"])
    if not gradients:
        return dict(zip(("out", "lse"), f(*args), strict=True))
    (out, lse), pull = jax.vjp(f, *args)
    dq, dk, dv, dsinks = pull((x["dout"].astype(out.dtype), x["dlse"]))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dsinks": dsinks}


def run(x, start, end, *, context, strategy=None, cap=None, gradients=True, implementation=None):
    """Results in natural order. start, end: natural-order global key bounds [B or 1, T]: traced, so that all masks
    share one compiled program."""
    ranks = context.ranks()
    T, S = x["query"].shape[1], x["key"].shape[1]
    # Padding holds junk that must not matter, but for dlse: the LSE of a padding query is its sink, and depends on it.
    fill = {name: 0 if name == "dlse" else 3 for name in x}
    laid = {name: lay_out(v, context.layout, ranks, fill=fill[name])[0] if v.ndim > 1 else v for name, v in x.items()}
    order = lay_out(x["query"], context.layout, ranks)[1]
    key_order = lay_out(x["key"], context.layout, ranks)[1]
    start, end = (
        np.pad(np.asarray(b), ((0, 0), (0, len(order) - T)), constant_values=S)[:, order] for b in (start, end)
    )
    resolved = ResolvedMask(jnp.asarray(start), jnp.asarray(end), context.layout, T, S)
    got = _run(
        {name: jnp.asarray(v) for name, v in laid.items()}, resolved, context=context,
        strategy=strategy, seq_len=T, kv_len=S, cap=cap, gradients=gradients, implementation=implementation,
    )  # fmt: skip
    of_keys = ("dk", "dv")
    for name in got:
        if name != "dsinks":
            got[name] = natural(got[name].astype(jnp.float32), *((key_order, S) if name in of_keys else (order, T)))
    return got


def expected(x, start, end, *, cap=None, gradients=True):
    B, T = x["query"].shape[:2]
    s = np.arange(x["key"].shape[1])
    visible = np.broadcast_to((s >= np.asarray(start)[..., None]) & (s < np.asarray(end)[..., None]), (B, T, len(s)))
    cotangents = {"dout": x["dout"], "dlse": x["dlse"]} if gradients else {}
    return oracle.attention(
        x["query"], x["key"], x["value"], visible, scale=0.3, cap=cap, sinks=x["sinks"], **cotangents
    )


def in_shares(backend, asked=None):
    """`backend` as one that shares of the heads keep busy; what a share leaves undefined is NaN. For emulated devices.

    `asked` gets, at every call, "f" or "b" and the first KV head of the share ("" for all of them).
    """

    def note(what, heads):
        if asked is not None:
            asked.append(what + (str(heads.first) if heads else ""))

    def forward(query, kv, *operands, heads=None, into=None, **options):
        note("f", heads)
        out, lse = backend.forward(query, kv, *operands, heads=heads, into=into, **options)
        if heads is not None and into is None:
            mine = heads.query_heads(query, kv)
            others = np.setdiff1d(np.arange(query.shape[2]), np.arange(mine.start, mine.stop))
            out, lse = out.at[:, :, others].set(jnp.nan), lse.at[:, :, others].set(jnp.nan)
        return out, lse

    def backward(*operands, heads=None, **options):
        note("b", heads)
        return backend.backward(*operands, heads=heads, **options)

    takes = lambda query, kv: kv.shape[-2] > 1  # noqa: E731
    return dataclasses.replace(backend, forward=forward, backward=backward, can_split_heads=takes)
