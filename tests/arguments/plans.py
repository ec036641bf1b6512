"""Tries for the planner."""

from ring_jax import plan
from tests.arguments.engine import Call
from tests.arguments.kinds import Choice, Count, Custom, Number, maybe

NOT_A_NAME = (3, 2.5, True, ["h100"], len)


def plans() -> list[Call]:
    good = {
        "model": "qwen3.5-0.8b",
        "tokens": 4096,
        "mesh": {"context": 2},
        "gpu": "h100",
        "batch": 2,
        "strategy": "ring",
    }
    good |= {"gdn_strategy": "state", "expert": None, "weights": ("context",), "optimizer_bytes": 8.0}
    mesh = Custom(
        types=(3, "context=2", 2.5, True, [2], len), common=False, values=({"ring": 2}, {"context": 0}, {"context": -1})
    )
    kinds = {
        "model": Custom(types=(None, 3, 2.5, True, [1], len, b"text"), values=("nonsense", "")),
        "tokens": Count(1),
        "mesh": maybe(mesh),
        "gpu": Custom(types=NOT_A_NAME, values=("b200", "")),
        "batch": maybe(Count(1)),
        "strategy": Choice(),
        "gdn_strategy": Choice(),
        "expert": maybe(Choice()),
        "weights": Custom(
            types=(3, 2.5, True, len), values=("tensor", ("context", "context"), ("nowhere",)), common=False
        ),
        "optimizer_bytes": Number(low=0),
    }
    small = {"model": "qwen3.5-0.8b", "tokens": 4096, "gpu": "h100", "what": "decode", "most": 8}
    more = {"what": Choice(), "most": Count(1)}
    aliases = {"model": ("preset", "config.json", "directory", "Config"), "mesh": ("context",)}
    return [
        Call(plan.predict, good, kinds, aliases=aliases),
        Call(
            plan.smallest_mesh,
            small,
            {name: kinds[name] for name in ("model", "tokens", "gpu")} | more,
            aliases=aliases,
        ),
    ]
