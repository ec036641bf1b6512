"""Counts the collectives of a compiled program from the text of its HLO."""

import collections
import re

_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf" ({'|'.join(_KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def count_collectives(hlo: str) -> dict[str, int]:
    """How often one run of the program issues each kind of collective.

    A collective inside a loop counts once per trip where XLA knows the number of trips (once where it does not); an
    asynchronous pair counts once; every branch of a conditional counts.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.

    Example:
      >>> count_collectives(jax.jit(f).lower(x).compile().as_text())
      {'collective-permute': 14}
    """
    own: dict[str, collections.Counter[str]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        opened = _COMPUTATION.match(line)
        if opened:
            name = opened[2]
            entry = name if opened[1] else entry
            own[name], calls[name] = collections.Counter(), []
        elif name:
            own[name].update(match[1] for match in _COLLECTIVE.finditer(line))
            trips = _TRIPS.search(line)
            times = int(trips[1]) if trips and " while(" in line else 1
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            calls[name] += [(callee, times) for callee in called]

    def total(computation: str) -> collections.Counter[str]:
        result = collections.Counter(own.get(computation, {}))
        for callee, times in calls.get(computation, []):
            for kind, count in total(callee).items():
                result[kind] += times * count
        return result

    return dict(sorted(total(entry).items()))
