"""The public calls, one entry each: what they accept, and the kinds of their arguments. `EXEMPT` says which names need none."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ring_jax
from ring_jax import distributed, gdn, layout, moe, nn
from ring_jax._hardware import HOPPER
from ring_jax.gdn import cost
from tests.arguments.engine import Call
from tests.arguments.kinds import (
    Arr,
    Axes,
    Choice,
    Count,
    Custom,
    DType,
    Flag,
    Function,
    Instance,
    LayoutLike,
    MaskLike,
    Number,
    Precision,
    maybe,
)

B, T, N, K, H = 2, 8, 4, 2, 6


def floats(*shape: int, value: float = 0.5, dtype: Any = np.float32) -> np.ndarray:
    return np.full(shape, value, dtype)


def ints(*shape: int, value: int = 1) -> np.ndarray:
    return np.full(shape, value, np.int32)


@functools.cache
def mesh(*names: str) -> jax.sharding.Mesh:
    shape = (2, *(1 for _ in names[1:]))
    return jax.sharding.Mesh(np.asarray(jax.devices()[:2]).reshape(shape), names)


@functools.cache
def context(**options: Any) -> ring_jax.ContextParallel:
    return ring_jax.ContextParallel("context", mesh=mesh("context"), **({"layout": "zigzag"} | options))


def manual(run):
    """`run` inside a shard_map over the context axis."""

    def inside():
        spec = jax.sharding.PartitionSpec()
        return jax.shard_map(run, mesh=mesh("context"), in_specs=(), out_specs=spec, check_vma=False)()

    return jax.eval_shape(inside)


# -- layouts and masks ---------------------------------------------------------------------------

INDEX = Arr("integer", scalars=True, ranks=False, known=(("negative", [-1]), ("beyond", [10**6])))
RANKS, SEQ = Count(1), Count(0)


def layouts() -> list[Call]:
    cyclic = layout.BlockCyclic
    calls = [
        Call(ring_jax.Striped, {"block": 2}, {"block": Count(1)}),
        Call(ring_jax.Zigzag, {"block": 2}, {"block": maybe(Count(1))}),
        Call(layout.as_layout, {"layout": "zigzag"}, {"layout": LayoutLike()}),
        Call(
            layout.work_per_rank,
            {"starts": ints(8, value=0), "ends": ints(8), "layout": "zigzag", "ranks": 2},
            {
                "starts": Arr("integer", (0,), known=(("negative", ints(8, value=-1)),)),
                "ends": Arr("integer", (0,), known=(("negative", ints(8, value=-1)),)),
                "layout": LayoutLike(),
                "ranks": RANKS,
            },
            check=lambda: layout.work_per_rank(ints(8, value=0), ints(8), "zigzag", 2),
            traceable=False,
        ),
    ]
    for cls in (ring_jax.Contiguous, ring_jax.Striped, ring_jax.Zigzag):
        made = cls()
        lengths = {"length": Count(0), "ranks": RANKS}
        calls += [
            Call(cls.padded_length, {"seq_len": 7, "ranks": 2}, {"seq_len": SEQ, "ranks": RANKS}, made.padded_length),
            Call(cls.block_size, {"length": 8, "ranks": 2}, lengths, made.block_size, aliases={"length": ("seq_len",)}),
            Call(cls.coarsen, {"factor": 2}, {"factor": RANKS}, made.coarsen),
        ]
    made = ring_jax.Zigzag()
    sizes = {"length": Count(0), "ranks": RANKS}
    aliases = {"length": ("seq_len", "positions")}
    x = {"x": floats(2, 8), "axis": 1, "ranks": 2}
    moved = {"x": Arr("any", (1,), ranks=False, much=False), "axis": Count(-2, 1), "ranks": RANKS}
    calls += [
        Call(
            cyclic.position,
            {"index": ints(2), "rank": 1, "length": 8, "ranks": 2},
            {"index": INDEX, "rank": INDEX, **sizes},
            made.position,
            aliases=aliases,
        ),
        Call(
            cyclic.rank_of,
            {"position": ints(2), "length": 8, "ranks": 2},
            {"position": INDEX, **sizes},
            made.rank_of,
            aliases=aliases,
        ),
        Call(
            cyclic.local_index,
            {"position": ints(2), "length": 8, "ranks": 2},
            {"position": INDEX, **sizes},
            made.local_index,
            aliases=aliases,
        ),
        Call(
            cyclic.count_below,
            {"g": ints(2), "rank": 1, "length": 8, "ranks": 2},
            {"g": INDEX, "rank": INDEX, **sizes},
            made.count_below,
            aliases=aliases,
        ),
        Call(
            cyclic.positions,
            {"rank": 1, "length": 8, "ranks": 2},
            {"rank": INDEX, **sizes},
            made.positions,
            aliases=aliases,
        ),
        Call(cyclic.describe, {"seq_len": 7, "ranks": 2}, {"seq_len": SEQ, "ranks": RANKS}, made.describe),
        Call(cyclic.restore, x, moved, made.restore, aliases={"x": ("length", "axis")}),
        Call(cyclic.scatter, x, moved, made.scatter, aliases={"x": ("length", "axis")}),
    ]
    return calls


ROWS = Arr("integer", lists=True, scalars=True, known=(("negative", [-1]),))


def masks() -> list[Call]:
    width = Custom(
        types=("3", 2.5, float("nan"), True, len),
        values=(-1, np.int64(-5), ints(2), 2**70, floats(1), [[1]], np.True_),
    )
    size = Custom(
        types=("3", 2.5, True, len, ("a", 1), (2.5, 1), (True, 1)),
        values=(-1, (-1, 0), (0, -5), (1, 2, 3), (1,), (), ints(3), 2**70, floats(2), (ints(2), 0), np.True_),
    )
    flat = {"lists": True, "ranks": False, "shapes": ((), (1, 2, 8))}
    ids = Arr("integer", **flat, known=(("two runs", [0, 1, 0, 1]), ("beyond int32", [2**40, 0])))
    borders = Arr("integer", **flat, known=(("descending", [0, 5, 3]),))
    interval = {"index": ints(4), "q_len": 4, "kv_len": 4, "query_offset": 0}
    both = ring_jax.causal() & ring_jax.window(2)
    return [
        Call(ring_jax.window, {"left": 3, "right": 1}, {"left": maybe(width), "right": maybe(width)}),
        Call(
            ring_jax.mask.local_window,
            {"size": (3, 1)},
            {"size": maybe(size)},
            aliases={"size": ("local_window_size", "window")},
        ),
        Call(ring_jax.prefix, {"n": 3}, {"n": ROWS}),
        Call(
            ring_jax.lengths,
            {"q": ints(2), "kv": ints(2), "left_padding": ints(2)},
            {"q": maybe(ROWS), "kv": maybe(ROWS), "left_padding": maybe(ROWS)},
        ),
        Call(
            ring_jax.documents,
            {"segment_ids": ints(2, 8)},
            {"segment_ids": maybe(ids)},
            conflicts=(
                ({"cu_seqlens": ints(3)}, "cu_seqlens"),
                ({"kv_cu_seqlens": ints(3)}, "kv_cu_seqlens"),
                ({"segment_ids": None}, "segment_ids"),
            ),
        ),
        Call(
            ring_jax.documents,
            {"cu_seqlens": np.array([0, 3, 8]), "kv_cu_seqlens": np.array([0, 3, 8])},
            {"cu_seqlens": maybe(borders), "kv_cu_seqlens": maybe(borders)},
            conflicts=(
                ({"kv_cu_seqlens": np.array([0, 8])}, "kv_cu_seqlens"),
                ({"cu_seqlens": np.array([0])}, "cu_seqlens"),
                ({"cu_seqlens": None}, "cu_seqlens"),
            ),
        ),
        Call(
            ring_jax.contiguous_segments,
            {"segment_ids": ints(2, 8)},
            {"segment_ids": Arr("integer", **flat)},
        ),
        Call(
            ring_jax.Mask.interval,
            interval,
            {"index": maybe(Arr("integer")), "q_len": SEQ, "kv_len": SEQ, "query_offset": ROWS},
            both.interval,
        ),
        Call(
            ring_jax.Mask.describe,
            {"q_len": 4, "kv_len": 4, "row": 0},
            {"q_len": SEQ, "kv_len": maybe(SEQ), "row": Count(0, 0)},
            both.describe,
            check=lambda: both.describe(4, 4),
        ),
        Call(
            ring_jax.Mask.__and__,
            {"other": ring_jax.causal()},
            {"other": Custom(types=(3, "text", True, [ring_jax.causal()], np.ones(2), ring_jax.causal))},
            both.__and__,
            conflicts=(({"other": ring_jax.prefix(3)}, "prefix"), ({"other": ring_jax.Mask(5)}, "Mask")),
            aliases={"other": ("Mask",)},
        ),
    ]


# -- ContextParallel -----------------------------------------------------------------------------


def contexts() -> list[Call]:
    cls, cp = ring_jax.ContextParallel, context()
    x, like = floats(B, T, N, H), maybe(Arr("any", ranks=False))
    good = {"axis": "context", "layout": "zigzag", "batch_axis": None, "head_axis": None, "mesh": mesh("context")}
    array = Arr("any", ranks=False)
    seq_axis, head_dim = Count(-4, 3), maybe(Count(-4, 3))
    moved = {"x": Arr("any", (1,), ranks=False, much=False), "seq_axis": seq_axis, "head_dim": head_dim}
    taken = (({"head_dim": 1}, "head_dim"), ({"head_dim": 0}, "head_dim"), ({"head_dim": -3}, "head_dim"))
    names = {"x": ("length", "axis")}
    return [
        Call(
            cls,
            good | {"strategy": "auto"},
            {
                "axis": Axes(most=2),
                "layout": LayoutLike(),
                "batch_axis": maybe(Axes()),
                "head_axis": maybe(Axes()),
                "mesh": maybe(Instance()),
                "strategy": Choice(),
            },
            conflicts=(
                ({"axis": "data"}, "data"),
                ({"batch_axis": "context"}, "context"),
                ({"head_axis": "tensor"}, "tensor"),
                ({"axis": ("context", "context")}, "context"),
            ),
        ),
        Call(cls.padded_length, {"seq_len": 7, "like": x}, {"seq_len": SEQ, "like": like}, cp.padded_length),
        Call(
            cls.to_layout,
            {"x": x, "seq_axis": 1, "head_dim": None},
            moved | {"x": array},
            cp.to_layout,
            taken,
            aliases=names,
        ),
        Call(
            cls.from_layout,
            {"x": x, "seq_len": 7, "seq_axis": 1, "head_dim": None},
            moved | {"seq_len": maybe(Count(0, T))},
            cp.from_layout,
            taken,
            aliases=names,
        ),
        Call(
            cls.relayout,
            {"x": x, "other": "striped", "seq_axis": 1, "head_dim": None},
            moved | {"other": LayoutLike()},
            cp.relayout,
            (*taken, ({"other": ring_jax.ContextParallel("other")}, "one mesh axis")),
            aliases=names | {"other": ("layout",)},
        ),
        Call(cls.positions, {"seq_len": 7, "like": x}, {"seq_len": SEQ, "like": like}, cp.positions),
        Call(
            cls.check_layout,
            {"function": lambda cp, x: x, "x": x, "tolerance": 1e-3},
            {
                "function": Function(),
                "x": Custom(types=("text", 3, [1.0], len), common=False),
                "tolerance": Number(low=0),
            },
            lambda function, x, tolerance: cp.check_layout(function, x, tolerance=tolerance),
            (
                ({"function": lambda cp, x: "text"}, "function"),
                ({"function": lambda cp, x: x + cp.ranks(x)}, "tolerance"),
            ),
            aliases={"x": ("arrays",)},
            check=lambda: cp.check_layout(lambda cp, x: x, x),
            traceable=False,
        ),
        Call(cls.describe, {"seq_len": 7, "like": x}, {"seq_len": SEQ, "like": like}, cp.describe),
        Call(
            cls.resolve,
            {"mask": ring_jax.causal(), "seq_len": 7, "key_value_seq_len": 7, "query_offset": 0, "like": x},
            {
                "mask": MaskLike(),
                "seq_len": SEQ,
                "key_value_seq_len": maybe(SEQ),
                "query_offset": ROWS,
                "like": like,
            },
            cp.resolve,
        ),
        Call(cls.resolve_mesh, {"like": x}, {"like": like}, cp.resolve_mesh),
        Call(cls.ranks, {"like": x}, {"like": like}, cp.ranks),
        Call(cls.shard, {"length": 8, "like": x}, {"length": SEQ, "like": like}, cp.shard),
        Call(cls.free, {"axis": "context"}, {"axis": maybe(Axes())}, cp.free),
        Call(
            cls.from_layout,
            {"x": x, "seq_len": None},
            {},
            lambda x, seq_len: manual(lambda: cp.from_layout(jnp.asarray(x), seq_len)),
            (({"seq_len": 7}, "seq_len"), ({"seq_len": -1}, "seq_len")),
        ),
    ]


# -- attention -----------------------------------------------------------------------------------

QKV = {"query": floats(B, T, N, H), "key": floats(B, T, K, H), "value": floats(B, T, K, H)}
LOW, HIGH = ints(B, T, value=0), ints(B, T, value=T)
IMPLEMENTATION, SCALE, CAP = maybe(Choice()), maybe(Number()), maybe(Number(above=0))


def ring_options() -> dict[str, Any]:
    """Of `ring_attention`, without arrays."""
    size = maybe(Custom(("3", 2.5, True, len, (True, 1)), (-1, (-1, 0), (1, 2, 3), (), floats(2))))
    return {
        "mask": maybe(MaskLike()),
        "scale": SCALE,
        "is_causal": Flag(),
        "local_window_size": size,
        "implementation": IMPLEMENTATION,
        "strategy": maybe(Choice()),
        "logits_soft_cap": CAP,
        "deterministic": maybe(Flag()),
    }


def attention() -> list[Call]:
    # "auto" and "reference" would take another way than a ring of the plain block; any is as good here.
    ring = QKV | {"context": context(), "is_causal": True, "strategy": "ring", "seq_len": T, "key_value_seq_len": T}
    ring |= {"query_seq_lengths": ints(B), "key_value_seq_lengths": ints(B), "query_offset": 0, "sinks": floats(N)}
    ring |= {"mask": ring_jax.window(3)}
    ring |= {"return_residual": False, "bias": None, "implementation": "xla", "scale": 0.5, "local_window_size": (3, 0)}
    arrays = {"query": Arr(bound=(0, 3)), "key": Arr(bound=(0, 1, 2, 3)), "value": Arr(bound=(0, 1, 2))}
    resolved = jax.eval_shape(lambda: context().resolve(ring_jax.causal(), T))
    kinds = arrays | ring_options()
    kinds |= {
        "context": Instance(),
        "seq_len": maybe(Count(0, T)),
        "key_value_seq_len": maybe(Count(0, T)),
        "query_seq_lengths": maybe(Arr("integer", (0,), lists=True, scalars=True, known=(("negative", [-1, 3]),))),
        "key_value_seq_lengths": maybe(Arr("integer", (0,), lists=True, scalars=True, known=(("negative", [-1, 3]),))),
        "query_offset": Arr("integer", lists=True, scalars=True, known=(("negative", [-1, 3]), ("rows", [1, 2, 3]))),
        "sinks": maybe(Arr(bound=(0,))),
        "return_residual": Flag(),
    }
    plain = {name: None for name in ("mask", "local_window_size", "query_seq_lengths", "key_value_seq_lengths")}
    plain["is_causal"] = False
    flash = QKV | {"key_start": LOW, "key_end": HIGH, "scale": 0.5, "logits_soft_cap": 30.0, "implementation": "xla"}
    flash |= {"deterministic": None, "carry": None}
    parts = {
        "out_a": floats(B, T, N, H),
        "lse_a": floats(B, T, N),
        "out_b": floats(B, T, N, H),
        "lse_b": floats(B, T, N),
    }
    part, lse = Arr(bound=(0, 1, 2, 3)), Arr(bound=(0, 1, 2))
    carry = (floats(B, T, N, H), floats(B, T, N))
    return [
        Call(
            ring_jax.ring_attention,
            ring,
            kinds,
            conflicts=(
                ({"bias": floats(B, N, T, T)}, "bias"),
                ({"mask": np.ones((T, T), bool)}, "mask"),
                ({"strategy": "ring_ulysses"}, "ring_ulysses"),
                ({"mask": ring_jax.prefix(3)}, "prefix"),
                ({"mask": resolved}, "resolved"),
                (plain | {"mask": resolved, "seq_len": 3}, "seq_len"),
                (plain | {"mask": resolved, "query_offset": 1}, "resolved"),
                ({"mask": ring_jax.lengths(ints(3))}, "mask"),
                ({"key": floats(B, T, 3, H), "value": floats(B, T, 3, H)}, "heads"),
                ({"query": floats(B, 7, N, H)}, "to_layout"),
                ({"query": floats(B, 16, N, H), "key_value_seq_len": None}, "key_value_seq_len"),
                ({"query": floats(B, T, N, H, dtype=np.float16)}, "dtype"),
                ({"context": ring_jax.ContextParallel("context")}, "mesh"),
            ),
            aliases={"key": ("shape",), "query_offset": ("mask",)},
        ),
        Call(
            ring_jax.flash_attention,
            flash,
            {
                "query": Arr(bound=(0, 1, 3)),
                "key": Arr(bound=(0, 1, 2, 3)),
                "value": Arr(bound=(0, 1, 2)),
                "key_start": Arr(
                    "integer",
                    (0, 1),
                    ranks=False,
                    shapes=((), (1, B, T)),
                    known=(("falling", np.arange(T, 0, -1)[None] % T),),
                ),
                "key_end": Arr(
                    "integer",
                    (0, 1),
                    ranks=False,
                    shapes=((), (1, B, T)),
                    known=(("falling", np.arange(T, 0, -1)[None]),),
                ),
                "scale": SCALE,
                "logits_soft_cap": CAP,
                "implementation": IMPLEMENTATION,
                "deterministic": maybe(Flag()),
                "carry": maybe(
                    Custom(
                        ("text", 3, carry[0], [None, None], (1.0, 2.0)),
                        (
                            carry[:1],
                            (),
                            carry[::-1],
                            (carry[0][:1], carry[1]),
                            (carry[0], ints(B, T, N)),
                            (*carry, carry[0]),
                        ),
                    )
                ),
            },
            conflicts=(
                ({"key": floats(B, T, 3, H), "value": floats(B, T, 3, H)}, "heads"),
                ({"implementation": "mosaic"}, "mosaic"),
                ({"implementation": "cudnn"}, "cudnn"),
                ({"value": floats(B, T, K, H, dtype=np.float16)}, "dtype"),
            ),
            aliases={"query": ("key_start",)},
        ),
        Call(ring_jax.merge_partials, parts, {"out_a": part, "lse_a": lse, "out_b": part, "lse_b": lse}),
        Call(
            ring_jax.flash_attention,
            flash | {"key_start": LOW[0], "key_end": HIGH[:1]},
            {"key_start": Arr("integer", (0,), ranks=False), "key_end": Arr("integer", (1,), ranks=False)},
        ),
    ]


# -- the gated delta rule ------------------------------------------------------------------------

HEADS = gdn.Heads(K, N, H, 4)


def rule_operands() -> dict[str, Any]:
    q, v = floats(B, T, K, H), floats(B, T, N, 4)
    operands = {"query": q, "key": q, "value": v, "log_decay": floats(B, T, N, value=-0.5), "beta": floats(B, T, N)}
    return operands | {"initial_state": floats(B, N, H, 4), "segment_ids": ints(B, T)}


def rules() -> list[Call]:
    good = rule_operands() | {"scale": 0.5, "implementation": "chunked", "strategy": "auto", "context": None}
    good |= {"precision": "highest"}
    kinds = {
        "query": Arr(bound=(0, 1, 2, 3)),
        "key": Arr(bound=(0, 1, 2, 3)),
        "value": Arr(bound=(0, 1, 2, 3)),
        "log_decay": Arr(
            bound=(0, 1, 2), known=(("positive", floats(B, T, N)), ("NaN", floats(B, T, N, value=np.nan)))
        ),
        "beta": Arr(bound=(0, 1, 2)),
        "initial_state": maybe(Arr(bound=(0, 1, 2, 3))),
        "segment_ids": maybe(Arr("signed", (0, 1))),
        "scale": SCALE,
        "implementation": IMPLEMENTATION,
        "precision": maybe(Choice()),
        "strategy": Choice(),
        "context": maybe(Instance()),
    }
    spread = good | {"context": context(), "strategy": "state"}
    shape = {"batch": 1, "length": 64, "heads": HEADS, "width": 8, "conv_width": 4, "layers": 1, "itemsize": 2}
    counts = {"batch": Count(), "length": Count(), "width": Count(), "conv_width": Count(1), "layers": Count(1)}
    made, rates = gdn.GDNShape(**shape), cost.Rates()
    conv = {"x": floats(B, T, 3), "weight": floats(4, 3), "tail": floats(B, 3, 3), "segment_ids": ints(B, T)}
    conv_kinds = {"x": Arr(bound=(2,)), "weight": Arr(bound=(1,)), "tail": maybe(Arr(bound=(0, 1, 2)))}
    conv_kinds["segment_ids"] = maybe(Arr("signed", (0, 1)))
    layers = lambda params, x, caches, partition: (x, caches)  # noqa: E731
    one = gdn.OneDevice(ints(B, T))
    with_one = {name: x for name, x in rule_operands().items() if name != "segment_ids"}
    run = {
        "layers": layers,
        "params": None,
        "x": floats(B, T, 3),
        "context": context(),
        "strategy": "state",
        "shape": made,
    }
    run |= {"caches": None, "segment_ids": ints(B, T), "seq_len": T}
    return [
        Call(
            gdn.gated_delta_rule,
            good,
            kinds,
            conflicts=(
                ({"strategy": "state"}, "context"),
                ({"value": floats(B, T, 3, 4)}, "heads"),
                ({"log_decay": floats(B, T, N, value=-1.0, dtype=np.float16)}, "log_decay"),
                ({"initial_state": floats(B, N, H, 4, dtype=np.float16)}, "initial_state"),
            ),
            aliases={"key": ("shape", "heads"), "value": ("heads",)},
        ),
        Call(
            gdn.gated_delta_rule,
            spread,
            kinds,
            conflicts=(
                ({"context": None}, "context"),
                ({"context": context(layout="striped")}, "state"),
                ({"strategy": "auto", "context": ring_jax.ContextParallel("context")}, "mesh"),
                ({name: x[:, :7] for name, x in rule_operands().items() if name != "initial_state"}, "7"),
            ),
            aliases={"key": ("shape", "heads"), "value": ("heads",), "context": ("strategy",)},
        ),
        Call(
            gdn.run,
            run,
            {
                "layers": Function(),
                "x": Custom(
                    types=("text", 3, [1, 2], [2.5]),
                    values=([], {}, floats(3), [floats(B, T), floats(B, 7)]),
                    common=False,
                ),
                "context": Instance(),
                "strategy": Choice(),
                "shape": maybe(Instance()),
                "caches": maybe(Custom(("text", 3, [1]), (floats(3, 2), [floats()]), common=False)),
                "segment_ids": maybe(Arr("signed", (0, 1))),
                "seq_len": maybe(Count(0, T)),
            },
            conflicts=(
                ({"strategy": "auto", "shape": None}, "shape"),
                ({"context": context(layout="striped")}, "state"),
                ({"x": floats(B, 7, 3), "segment_ids": None, "seq_len": None}, "7"),
            ),
        ),
        Call(
            gdn.partition,
            {"context": None, "x": floats(B, T, 3), "strategy": "state", "shape": made}
            | {"segment_ids": ints(B, T), "seq_len": T},
            {
                "context": maybe(Instance()),
                "x": Arr("any", (0, 1)),
                "strategy": Choice(),
                "shape": maybe(Instance()),
                "segment_ids": maybe(Arr("signed", (0, 1))),
                "seq_len": maybe(Count(0, T)),
            },
            conflicts=(({"context": context()}, "shard_map"),),
        ),
        Call(gdn.causal_convolution, conv, conv_kinds, aliases={"x": ("weight",), "weight": ("tail",)}),
        Call(
            gdn.Heads,
            {"key_heads": 2, "value_heads": 4, "key_size": 6, "value_size": 4},
            {name: Count(1) for name in ("key_heads", "value_heads", "key_size", "value_size")},
        ),
        Call(gdn.Heads.share, {"ranks": 2}, {"ranks": Count(1)}, HEADS.share, (({"ranks": 3}, "3 ranks"),)),
        Call(
            gdn.GDNCache.empty,
            {"batch": 2, "heads": HEADS, "width": 4, "dtype": jnp.float32},
            {"batch": Count(), "heads": Instance(), "width": Count(1), "dtype": DType()},
        ),
        Call(gdn.GDNShape, shape, counts | {"itemsize": Count(1), "heads": Instance()}),
        Call(
            gdn.costs,
            {"shape": made, "ranks": 2, "layout": "zigzag", "gpu": HOPPER},
            {"shape": Instance(), "ranks": RANKS, "layout": LayoutLike(), "gpu": Instance()},
        ),
        Call(
            gdn.choose_strategy,
            {"shape": made, "ranks": 2, "layout": "zigzag", "rates": rates},
            {"shape": Instance(), "ranks": RANKS, "layout": LayoutLike(), "rates": Instance()},
        ),
        Call(gdn.Cost.seconds, {"rates": rates}, {"rates": Instance()}, gdn.Cost(1.0, 1.0, 1).seconds),
        Call(
            cost.Rates,
            {"flops_per_second": 1e13, "bytes_per_second": 1e11, "seconds_per_collective": 1e-5},
            {
                "flops_per_second": maybe(Number(above=0)),
                "bytes_per_second": Number(above=0),
                "seconds_per_collective": Number(low=0),
            },
        ),
        Call(gdn.OneDevice, {"segment_ids": ints(B, T)}, {"segment_ids": maybe(Arr("signed"))}),
        Call(
            gdn.OneDevice.gated_delta_rule,
            with_one,
            {name: kinds[name] for name in with_one},
            lambda query, key, value, log_decay, beta, **rest: one.gated_delta_rule(
                query, key, value, log_decay, beta, **rest
            ),
            aliases={"key": ("shape", "heads"), "value": ("heads",)},
        ),
        Call(
            gdn.OneDevice.causal_convolution,
            {name: conv[name] for name in ("x", "weight", "tail")},
            {name: conv_kinds[name] for name in ("x", "weight", "tail")},
            one.causal_convolution,
            aliases={"x": ("weight",), "weight": ("tail",)},
        ),
    ]


# -- mixture of experts --------------------------------------------------------------------------


def experts() -> list[Call]:
    D, E, F = 4, 6, 3
    weights = {"router": floats(D, E), "gate_up": floats(E, D, 2, F), "down": floats(E, F, D)}
    good = {"x": floats(T, D), **weights, "top_k": 2, "renormalize": True, "expert_axis": None, "tokens_spread": True}
    good |= {"tensor_axis": None, "valid": np.ones(T, bool), "strategy": "auto"}

    def run(*, router, gate_up, down, **rest):
        return moe.moe(weights=moe.MoEWeights(router, gate_up, down), **rest)

    kinds: dict[str, Any] = {"x": Arr(bound=(1,)), "router": Arr(bound=(0, 1)), "gate_up": Arr(bound=(0, 1, 2, 3))}
    kinds |= {"down": Arr(bound=(0, 1, 2)), "top_k": Count(1, E), "renormalize": Flag(), "expert_axis": maybe(Axes())}
    kinds |= {"tokens_spread": Flag(), "tensor_axis": maybe(Axes()), "valid": maybe(Arr("bool", (0,)))}
    kinds |= {"strategy": Choice()}
    routing = moe.Routing(ints(T, 2), floats(T, 2), floats(T, E))
    stats = moe.RouterStats(floats(E), floats(E), floats())
    return [
        Call(
            moe.moe,
            good,
            kinds,
            run,
            conflicts=(
                ({"strategy": "gather"}, "strategy"),
                ({"expert_axis": "experts"}, "expert_axis"),
                ({"tensor_axis": "tensor"}, "tensor_axis"),
                ({"gate_up": floats(3, D, 2, F), "down": floats(3, F, D)}, "experts"),
                ({"router": floats(D, E, dtype=np.float16)}, "router"),
            ),
            aliases={"router": ("experts",), "gate_up": ("weights", "down", "experts"), "x": ("router", "valid")},
        ),
        Call(
            moe.moe,
            {"x": floats(T, D), "weights": moe.MoEWeights(**weights), "top_k": 2},
            {"weights": Instance()},
        ),
        Call(
            moe.route,
            {"x": floats(T, D), "router": floats(D, E), "top_k": 2, "renormalize": True, "valid": np.ones(T, bool)},
            {
                "x": Arr(bound=(1,)),
                "router": Arr(bound=(0,)),
                "top_k": Count(1, E),
                "renormalize": Flag(),
                "valid": maybe(Arr("bool", (0,))),
            },
            aliases={"x": ("router",)},
        ),
        Call(
            moe.RouterStats.of,
            {"routing": routing, "valid": np.ones(T, bool)},
            {"routing": Instance(), "valid": maybe(Arr("bool", (0,)))},
        ),
        Call(
            moe.RouterStats.__add__,
            {"other": stats},
            {"other": Custom(types=(3, "text", 0, np.ones(2)))},
            stats.__add__,
            aliases={"other": ("RouterStats",)},
        ),
        Call(
            moe.load_balance_loss,
            {"counts": floats(E), "probs": floats(E), "tokens": floats()},
            {"counts": Arr(), "probs": Arr(bound=(0,)), "tokens": Arr()},
            lambda **fields: moe.load_balance_loss(moe.RouterStats(**fields)),
        ),
        Call(moe.load_balance_loss, {"stats": stats}, {"stats": Instance()}),
    ]


# -- Flax layers ---------------------------------------------------------------------------------


def filled(make):
    """What `make` builds, with ones for parameters: no initialiser runs."""
    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), state))


def layers() -> list[Call]:
    attention = {"features": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "is_causal": True, "context": None}
    attention |= {"local_window_size": None, "rope_theta": 1e4, "rotary_fraction": 1.0, "qk_norm": False}
    attention |= {"norm_epsilon": 1e-6, "output_gate": False, "use_bias": False, "strategy": None, "precision": None}
    attention |= {"implementation": None, "dtype": None, "param_dtype": jnp.float32, "kernel_init": None}
    net = {"features": 24, "num_key_heads": K, "num_value_heads": N, "key_head_dim": H, "value_head_dim": 4}
    net |= {"conv_width": 4, "norm_epsilon": 1e-6, "projections": "separate", "context": None, "strategy": "auto"}
    net |= {"implementation": None, "dtype": None, "param_dtype": jnp.float32, "precision": None, "kernel_init": None}
    both: dict[str, Any] = {"features": Count(1), "norm_epsilon": Number(above=0), "context": maybe(Instance())}
    both |= {"implementation": IMPLEMENTATION, "dtype": maybe(DType()), "param_dtype": DType()}
    both |= {"precision": maybe(Precision()), "kernel_init": maybe(Function()), "rngs": Instance()}
    size = maybe(Custom(("3", 2.5, True, len), (-1, (-1, 0), (1, 2, 3), ())))
    rngs = nnx.Rngs(0)

    def make(cls, options):
        return nnx.eval_shape(lambda: cls(**options, rngs=nnx.Rngs(0)))

    here, there = (
        filled(lambda c=c: nn.Attention(**(attention | {"context": c}), rngs=nnx.Rngs(0))) for c in (None, context())
    )
    rule = filled(lambda: nn.GatedDeltaNet(**net, rngs=nnx.Rngs(0)))
    x, cache = floats(B, T, 24), gdn.GDNCache(floats(B, N, H, 4), floats(B, 3, 40), ints(B))
    call = {"x": x, "positions": ints(T), "mask": None, "seq_len": T}
    call_kinds: dict[str, Any] = {
        "x": Arr(bound=(2,)),
        "positions": maybe(Arr("integer", (0,), ranks=False, shapes=((), (3, T), (1, 1, T)))),
    }
    call_kinds |= {"mask": maybe(MaskLike()), "seq_len": maybe(Count(0, T))}
    fused = {"qkvz": floats(5, 2 * K * H + 2 * N * 4), "ba": floats(5, 2 * N), "heads": HEADS}
    rope = {"x": floats(B, T, N, H), "positions": ints(T), "theta": 1e4, "rotary_fraction": 1.0}
    fn, hook = context().attention_fn(is_causal=True), nn.AttentionFn
    flax: dict[str, Any] = {**QKV, "mask": None, "broadcast_dropout": True, "dropout_rate": 0.0, "deterministic": True}
    flax |= {"dtype": None, "precision": None, "promote_dtype": None, "is_causal": True}
    flax |= {"force_fp32_for_softmax": False, "input_positions": None, "bias": None}
    options = {name: kind for name, kind in ring_options().items()}
    defaults = {name: None for name in options} | {"is_causal": True, "seq_len": 7, "rope": None, "query_offset": 0}
    options |= {
        "seq_len": maybe(SEQ),
        "rope": maybe(Function()),
        "query_offset": Custom(types=("3", 2.5, True), values=(-1, floats(1))),
    }
    return [
        Call(
            nn.Attention,
            attention | {"rngs": rngs},
            both
            | {
                "num_heads": Count(1),
                "num_kv_heads": maybe(Count(1)),
                "head_dim": maybe(Count(1)),
                "is_causal": Flag(),
                "local_window_size": size,
                "rope_theta": maybe(Number(above=0)),
                "rotary_fraction": Number(above=0, high=1),
                "qk_norm": Flag(),
                "output_gate": Flag(),
                "use_bias": Flag(),
                "strategy": maybe(Choice()),
            },
            conflicts=(
                ({"num_kv_heads": 3}, "num_kv_heads"),
                ({"features": 25, "head_dim": None}, "features"),
                ({"rotary_fraction": 0.5}, "rotary_fraction"),
            ),
            check=functools.partial(make, nn.Attention, attention),
        ),
        Call(
            nn.Attention.__call__,
            call,
            call_kinds,
            here,
            conflicts=(
                ({"mask": jax.eval_shape(lambda: context().resolve(ring_jax.causal(), T))}, "resolved"),
                ({"mask": ring_jax.documents(segment_ids=ints(3))}, "segment_ids"),
            ),
        ),
        Call(
            nn.Attention.__call__,
            call,
            call_kinds,
            there,
            conflicts=(({"x": floats(B, 7, 24), "positions": None}, "7"),),
        ),
        Call(
            nn.GatedDeltaNet,
            net | {"rngs": rngs},
            both
            | {
                "num_key_heads": Count(1),
                "num_value_heads": Count(1),
                "key_head_dim": Count(1),
                "value_head_dim": Count(1),
                "conv_width": Count(1),
                "projections": Choice(),
                "strategy": Choice(),
            },
            conflicts=(({"num_value_heads": 3}, "num_value_heads"),),
            check=functools.partial(make, nn.GatedDeltaNet, net),
        ),
        Call(
            nn.GatedDeltaNet.__call__,
            {"x": x, "cache": cache, "segment_ids": ints(B, T), "seq_len": T, "partition": None},
            {
                "x": Arr(bound=(0, 2)),
                "cache": maybe(Instance()),
                "segment_ids": maybe(Arr("signed", (0, 1))),
                "seq_len": maybe(Count(0, T)),
                "partition": maybe(Instance()),
            },
            rule,
            conflicts=(
                ({"partition": gdn.OneDevice()}, "segment_ids"),
                ({"cache": gdn.GDNCache(floats(3, N, H, 4), floats(3, 3, 40), ints(3))}, "cache"),
                ({"cache": gdn.GDNCache(floats(B, N, H, 4), floats(B, 2, 40), ints(B))}, "cache"),
            ),
            aliases={"x": ("cache",)},
        ),
        Call(
            nn.GatedDeltaNet.shape,
            {"layers": 1, "dtype": jnp.float32},
            {"layers": Count(1), "dtype": DType()},
            rule.shape,
        ),
        Call(
            nn.GatedDeltaNet.empty_cache,
            {"batch": 2, "dtype": jnp.float32},
            {"batch": Count(), "dtype": DType()},
            rule.empty_cache,
        ),
        Call(
            nn.split_fused_projections,
            fused,
            {"qkvz": Arr(bound=(0, 1)), "ba": Arr(bound=(0, 1)), "heads": Instance()},
            conflicts=(({"heads": gdn.Heads(3, 4, 6, 4)}, "heads"),),
            aliases={"qkvz": ("ba",)},
        ),
        Call(
            nn.apply_rope,
            rope,
            {
                "x": Arr(bound=(1,)),
                "positions": Arr("integer", (0,), ranks=False, shapes=((), (3, T), (1, 1, T))),
                "theta": Number(above=0),
                "rotary_fraction": Number(above=0, high=1),
            },
            conflicts=(({"rotary_fraction": 0.5}, "rotary_fraction"), ({"positions": floats(T)}, "positions")),
            aliases={"x": ("positions",)},
        ),
        Call(
            nn.attention_fn,
            {"context": context(), **defaults},
            {"context": Instance(), **options},
            conflicts=(
                ({"nonsense": 3}, "nonsense"),
                ({"sinks": floats(N)}, "sinks"),
                ({"query_seq_lengths": ints(B)}, "query_seq_lengths"),
            ),
        ),
        Call(
            ring_jax.ContextParallel.attention_fn,
            defaults,
            options,
            context().attention_fn,
            conflicts=(({"nonsense": 3}, "nonsense"),),
        ),
        Call(
            hook,
            {"context": context(), "defaults": ()},
            {"context": Instance(), "defaults": Custom(types=(3, "text", [], (1,), ((1, 2),), (("a",),)))},
        ),
        Call(
            hook.__call__,
            flax,
            {
                "query": Arr(bound=(0, 3), ranks=False),
                "key": Arr(bound=(0, 2, 3), ranks=False),
                "value": Arr(bound=(0, 1, 2), ranks=False),
                "mask": maybe(MaskLike()),
                "broadcast_dropout": Flag(),
                "dropout_rate": Number(low=0, high=1),
                "deterministic": Flag(),
                "dtype": maybe(DType()),
                "precision": maybe(Precision()),
                "promote_dtype": maybe(Function()),
                "is_causal": Flag(),
                "force_fp32_for_softmax": Flag(),
            },
            fn,
            conflicts=(
                ({"bias": floats(1)}, "bias"),
                ({"dropout_rate": 0.5, "deterministic": False}, "dropout"),
                ({"input_positions": ints(T)}, "rope"),
                ({"query": floats(T, N)}, "query"),
            ),
            aliases={"key": ("shape", "heads"), "query": ("shape", "key")},
        ),
        Call(
            hook.__call__,
            flax | {"input_positions": ints(T)},
            {"input_positions": maybe(Arr("integer", (0,), ranks=False))},
            context().attention_fn(rope=nn.apply_rope),
        ),
    ]


# -- processes ---------------------------------------------------------------------------------------


def processes() -> list[Call]:
    devices = Custom(types=(3, "text", True, [1, 2], len, []), common=True)
    sizes = {"context": 2, "data": 2, "tensor": 2, "expert": 1}
    fits = Custom(types=("3", 2.5, True, len, (1,)), values=(-1, 0, 3, 10**9))
    return [
        Call(
            distributed.mesh,
            {**sizes, "devices": jax.devices()[:8]},
            {**dict.fromkeys(sizes, fits), "context": maybe(fits), "devices": maybe(devices)},
        ),
        Call(distributed.links, {"mesh": mesh("context")}, {"mesh": Instance()}),
        Call(distributed.recommended_flags, {"processes": 2}, {"processes": Count(1)}),
        Call(
            distributed.use_flags,
            {"flags": distributed.recommended_flags(), "environment": {}},
            {
                "flags": Custom(types=(None, 3, 2.5, True, "text", b"text", [1], {1}, len), common=False),
                "environment": Custom(types=(3, "text", True, [1], len), common=False),
            },
        ),
    ]
