"""What compiled programs send between devices, read off their text, and the memory that they take."""

import os
import re
from collections import Counter

import numpy as np

_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<kind>all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+)\[(?P<dims>[\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f64": 8, "s64": 8}


def results(compiled) -> list[tuple[str, str]]:
    """(kind, type of the first result) of every collective of a compiled program, like ("all-gather", "f32[2,64]")."""
    return [(match["kind"], _ARRAY.search(match["type"])[0]) for match in _COLLECTIVE.finditer(compiled.as_text())]


def collectives(compiled) -> list[tuple[str, int]]:
    """(kind, bytes of the results) of every collective of a compiled program."""
    found = []
    for match in _COLLECTIVE.finditer(compiled.as_text()):
        sizes = [
            _BYTES[a["dtype"]] * int(np.prod([int(d) for d in a["dims"].split(",") if d]))
            for a in _ARRAY.finditer(match["type"])
        ]
        found.append((match["kind"], sum(sizes)))
    return found


def kinds(found: list) -> Counter:
    """How many collectives of each kind there are in what `results` or `collectives` found."""
    return Counter(kind for kind, _ in found)


def memory(lowered):
    """Memory of a lowered program, compiled with the fusion emitters that the suite leaves out where it can: they decide what is fused."""
    name = "xla_cpu_use_fusion_emitters"
    options = {name: True} if name in os.environ["XLA_FLAGS"] else None
    return lowered.compile(compiler_options=options).memory_analysis()
