"""Entries of `ring_jax.pages`, see `calls`."""

from __future__ import annotations

import numpy as np

from ring_jax import pages
from tests.arguments.calls import CAP, IMPLEMENTATION, SCALE, floats, ints, manual
from tests.arguments.engine import Call
from tests.arguments.kinds import Arr, Axes, Choice, Count, Instance, LayoutLike, maybe

R, T, N, K, H, P, SLOTS, WIDTH = 3, 2, 4, 2, 6, 5, 4, 3
INDEX = Arr("integer", scalars=True, ranks=False, known=(("negative", [-1]),))
RANK = Arr("integer", scalars=True, ranks=False, known=(("negative", [-1]), ("beyond", [2])))
POOL = Arr(bound=(3,), ranks=False, shapes=((2, P, SLOTS, K), (P, SLOTS, K, H), (3, P, SLOTS, K, H)))
PLACEMENT = pages.Placement(2, SLOTS)
# A layer that is traced is cut to those that are there.
LAYER = Arr("integer", scalars=True, ranks=False, shapes=((1,), (2,)))


def inside(call, **fixed):
    return lambda **arguments: manual(lambda: call(**arguments, **fixed))


def calls() -> list[Call]:
    pool, table, lengths = floats(2, P, SLOTS, K, H), ints(R, WIDTH), ints(R)
    held = {"pages": pool, "table": table, "lengths": lengths, "layer": 0}
    integers = {"table": Arr("integer", (0,)), "lengths": Arr("integer", (0,))}
    pool_kind = Arr(bound=(0, 3, 4), ranks=False, shapes=((2, P, SLOTS, K), (3, P, SLOTS, K, H)))
    options = {"scale": 0.5, "logits_soft_cap": 30.0, "implementation": "xla"}
    option_kinds = {"scale": SCALE, "logits_soft_cap": CAP, "implementation": IMPLEMENTATION}
    query, new = floats(R, T, N, H), floats(R, T, K, H)
    place = pages.Placement
    return [
        Call(place, {"ranks": 2, "page": 4}, {"ranks": Count(1), "page": Count(1)}),
        Call(place.pages, {"length": 5}, {"length": INDEX}, PLACEMENT.pages),
        Call(place.locate, {"position": 5}, {"position": INDEX}, PLACEMENT.locate),
        Call(place.position, {"index": 5, "rank": 1}, {"index": INDEX, "rank": RANK}, PLACEMENT.position),
        Call(place.local_length, {"length": 5, "rank": 1}, {"length": INDEX, "rank": RANK}, PLACEMENT.local_length),
        Call(
            pages.gather_pages,
            {"pages": pool, "table": table, "layer": 0},
            {
                "pages": Arr(bound=(0,), ranks=False, shapes=((2, P, SLOTS, K),)),
                "table": Arr("integer"),
                "layer": LAYER,
            },
        ),
        Call(
            pages.paged_attention,
            {"query": query, **held, **options},
            {"query": Arr(bound=(0, 3)), "pages": pool_kind, **integers, "layer": LAYER, **option_kinds},
            conflicts=(
                ({"pages": floats(2, P, SLOTS, 3, H)}, "heads"),
                ({"query": floats(R, T, N, H, dtype=np.float16)}, "dtype"),
                ({"implementation": "mosaic"}, "mosaic"),
                ({"layer": 1}, "layer"),
            ),
            aliases={"pages": ("heads",)},
        ),
        Call(
            pages.write_pages,
            {
                "pages": pool,
                "new": floats(2, R, T, K, H),
                "table": table,
                "positions": ints(R, T),
                "placement": PLACEMENT,
                "rank": 1,
            },
            {
                "pages": Arr(bound=(0, 2, 3, 4), ranks=False, shapes=((2, P, SLOTS, K),)),
                "new": Arr(bound=(0, 1, 2, 3, 4)),
                "table": Arr("integer", (0,)),
                "positions": Arr("integer", (0, 1)),
                "placement": Instance(),
                "rank": RANK,
            },
            aliases={"table": ("positions",), "pages": ("new",), "positions": ("new",)},
        ),
        Call(
            pages.to_owners,
            {
                "new": floats(2, R, 8, K, H),
                "start": ints(R),
                "lengths": ints(R),
                "placement": PLACEMENT,
                "layout": "zigzag",
                "axis": "context",
            },
            {
                "new": Arr(bound=(1,), ranks=False, shapes=((R, 8, K),)),
                "start": Arr("integer", (0,)),
                "lengths": Arr("integer", (0,)),
                "placement": Instance(),
                "layout": LayoutLike(),
                "axis": maybe(Axes()),
            },
            inside(lambda **x: pages.to_owners(**x)[0]),
            conflicts=(
                ({"axis": None}, "axis"),
                ({"axis": "data"}, "data"),
                ({"placement": pages.Placement(3, SLOTS)}, "ranks"),
            ),
            aliases={"new": ("start",), "layout": ("axis",)},
        ),
        Call(
            pages.decode_attention,
            {
                "query": query,
                "key": new,
                "value": new,
                **held,
                "placement": PLACEMENT,
                "axis": "context",
                **options,
                "outputs": "same",
                "strategy": "auto",
            },
            {
                "query": Arr(bound=(0, 1, 3)),
                "key": Arr(bound=(0, 1, 2, 3)),
                "value": Arr(bound=(0, 1, 2, 3)),
                "pages": Arr(bound=(0, 2, 3, 4), ranks=False, shapes=((2, P, SLOTS, K),)),
                **integers,
                "layer": LAYER,
                "placement": Instance(),
                "axis": maybe(Axes()),
                **option_kinds,
                "outputs": Choice(),
                "strategy": Choice(),
            },
            inside(pages.decode_attention),
            conflicts=(
                ({"axis": None}, "axis"),
                ({"axis": "data"}, "data"),
                ({"query": floats(R, T, 3, H)}, "heads"),
                ({"key": floats(R, T, K, H, dtype=np.float16)}, "dtype"),
            ),
            aliases={"pages": ("slots",), "query": ("key",)},
        ),
        Call(
            pages.choose_merge,
            {"queries": 32, "heads": 16, "head_size": 64, "ranks": 8, "outputs": "same", "itemsize": 2},
            {
                "queries": Count(0),
                "heads": Count(0),
                "head_size": Count(1),
                "ranks": Count(1),
                "outputs": Choice(),
                "itemsize": Count(1),
            },
        ),
    ]
