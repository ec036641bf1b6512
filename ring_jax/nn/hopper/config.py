"""How products of few rows are cut, validated when made, and which config serves which sizes."""

import dataclasses

WARPS, LANES, VECTOR = 4, 32, 8  # of a warpgroup; of a warp; elements of a thread's load
MULTIPROCESSORS = 132
_ENOUGH = 100  # programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRowsConfig:
    """How a product is cut.

    Attributes:
        columns: results of a program, of each row: 8, 16, 32, 64 or 128.
        warpgroups: of a program; each takes every warpgroups-th piece of the weight's rows.
        loads: pieces of 16 bytes that each thread has in flight.
    """

    columns: int
    warpgroups: int = 4
    loads: int = 8

    def __post_init__(self) -> None:
        if self.columns not in (8, 16, 32, 64, 128):
            raise ValueError(f"{self.columns=} must be 8, 16, 32, 64 or 128")
        if self.warpgroups not in (1, 2, 4):
            raise ValueError(f"{self.warpgroups=} must be 1, 2 or 4")
        if not 1 <= self.loads <= 16:
            raise ValueError(f"{self.loads=} must be from 1 to 16")

    @property
    def warp_rows(self) -> int:
        """Rows of the weight that a warp loads at once."""
        return LANES * VECTOR // self.columns

    @property
    def step(self) -> int:
        """Rows of the weight that a program takes at once."""
        return WARPS * self.warp_rows * self.warpgroups * self.loads


def few_rows_config(rows: int, depth: int, results: int, swiglu: bool) -> FewRowsConfig | None:
    """The config that is used for these sizes, None where none fits: the widest programs of which there are enough for most
    multiprocessors. Found by `python -m ring_jax.bench.products --tune` on an H100."""
    found: list[tuple[int, FewRowsConfig]] = []
    for columns in (64, 32, 16, 8):
        programs = results // columns
        # One program for each multiprocessor needs all warps, of several some may wait; of narrow ones many rows come at once.
        warpgroups = 1 if columns == 8 and rows == 1 else 4 if programs <= MULTIPROCESSORS or swiglu else 2
        most = 8 if rows == 1 and columns > 8 else 4
        shape = {"columns": columns, "warpgroups": warpgroups}
        # Two steps at least: the loads of one beside the arithmetic of another program's.
        fits = (FewRowsConfig(**shape, loads=n) for n in range(most, 0, -1))
        config = next((config for config in fits if depth % config.step == 0 and depth > config.step), None)
        if results % columns == 0 and config is not None:
            found.append((min(programs, _ENOUGH), config))
    return max(found, key=lambda each: each[0])[1] if found else None
