"""Tile sizes of the grouped products, validated when made, and which of them serve how many rows."""

import dataclasses
from typing import Any

SHARED_MEMORY_BYTES = 227 * 1024
_BARRIER_BYTES = 1024
DEPTH = 64  # contraction of one pipeline step: 128 bytes of 16-bit elements, one swizzle
ROWS = 64  # of a warpgroup's wgmma
# Per thread of a compute warpgroup and of the memory warpgroup (setmaxnreg), where there are two compute warpgroups. Three
# warpgroups start with 168 each, and wait for ever for more than three times that.
REGISTERS = (224, 56)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedConfig:
    """How a grouped product is cut.

    Attributes:
        rows: of a tile; up to 64 for each compute warpgroup. Fewer are loaded where experts have few.
        columns: of a tile, at most 256; in a SwiGLU product half of them are gate, half up.
        width: columns of one chunk of weights in shared memory (its swizzle): 64, or 32 for narrow SwiGLU tiles.
        stages: steps in flight in shared memory.
        warpgroups: compute warpgroups, of 64 rows each.
        swiglu: whether half of the columns are gate, half up, and a tile's result is half as wide.
        band: tiles of rows that each tile of columns goes through before the next one. Many where experts have many rows: those stay
            in L2 meanwhile, and weights are read once a band.
        multiprocessors: thread blocks, each walking over several tiles.
    """

    rows: int = 128
    columns: int = 256
    width: int = 64
    stages: int = 4
    warpgroups: int = 2
    swiglu: bool = False
    band: int = 1
    multiprocessors: int = 132

    def __post_init__(self) -> None:
        if self.warpgroups not in (1, 2):
            raise ValueError(f"{self.warpgroups=} must be 1 or 2")
        if self.rows % 16 or not 16 <= self.rows <= ROWS * self.warpgroups:
            raise ValueError(f"{self.rows=} must be a multiple of 16, at most 64 for each warpgroup")
        if self.width not in (32, 64):
            raise ValueError(f"{self.width=} must be 32 or 64")
        chunk = 2 * self.width if self.swiglu else self.width
        if self.columns % chunk or not 0 < self.columns <= 256:
            raise ValueError(f"{self.columns=} must be a multiple of {chunk}, at most 256")
        if self.stages < 3:
            raise ValueError(f"{self.stages=} must be at least 3")
        if self.band < 1:
            raise ValueError(f"{self.band=} must be positive")
        if self.multiprocessors < 1:
            raise ValueError(f"{self.multiprocessors=} must be positive")
        if self.shared_memory_bytes > SHARED_MEMORY_BYTES:
            raise ValueError(f"{self} needs {self.shared_memory_bytes} bytes of shared memory")

    @property
    def chunks(self) -> int:
        return self.columns // self.width

    @property
    def lag(self) -> int:
        """Steps between the start of copies of rows and the wait for them; more would wait for their own consumers."""
        return min(self.stages - 2, 3)

    @property
    def result_columns(self) -> int:
        return self.columns // 2 if self.swiglu else self.columns

    @property
    def pitch(self) -> int:
        """Elements from row to row of a staged result: 16 bytes more than the row, so that eight rows hit all banks."""
        return self.result_columns + 8

    @property
    def shared_memory_bytes(self) -> int:
        """For 16-bit operands."""
        step = (self.warpgroups * ROWS + self.columns) * DEPTH * 2
        return self.stages * step + self.warpgroups * ROWS * self.pitch * 2 + _BARRIER_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The products of a layer: `up` is SwiGLU's, `down` the one after it. Both cut rows alike."""

    up: GroupedConfig
    down: GroupedConfig

    def __post_init__(self) -> None:
        if self.up.rows != self.down.rows:
            raise ValueError(f"rows of a tile must be the same in both, got {self.up.rows=}, {self.down.rows=}")

    @property
    def rows(self) -> int:
        return self.up.rows


def experts_config(rows_per_expert: float, features: int, width: int) -> ExpertsConfig:
    """The config for experts [width, features] that see so many rows each on average."""
    if rows_per_expert > 48:
        up = GroupedConfig(columns=2 * _widest(features, 128), stages=4, swiglu=True)
        return ExpertsConfig(up=up, down=GroupedConfig(columns=_widest(width), stages=3))
    few: dict[str, Any] = {"rows": 64 if rows_per_expert > 8 else 16, "warpgroups": 1}
    down = GroupedConfig(columns=_widest(width, 128), stages=7, **few)
    if rows_per_expert > 1:
        return ExpertsConfig(up=GroupedConfig(columns=128, stages=7, swiglu=True, **few), down=down)
    return ExpertsConfig(up=GroupedConfig(columns=64, width=32, stages=10, swiglu=True, **few), down=down)


def dense_config(features: int) -> GroupedConfig:
    """For SwiGLU's product of many rows with weights [width, 2 features] that all of them share."""
    return GroupedConfig(columns=2 * _widest(features, 128), stages=4, swiglu=True, band=16)


def product_config(columns: int) -> GroupedConfig:
    """For a product of many rows with weights of so many columns: those of the backward pass."""
    return GroupedConfig(columns=_widest(columns), stages=3)


def outer_config(rows: int, columns: int) -> GroupedConfig:
    """For gradients [rows, columns] of each expert's weights."""
    warpgroups = 2 if rows % (2 * ROWS) == 0 else 1
    return GroupedConfig(rows=ROWS * warpgroups, columns=_widest(columns), stages=3, warpgroups=warpgroups)


def _widest(size: int, most: int = 256) -> int:
    """The widest tile that divides `size` columns, a multiple of 64."""
    return next(n for n in (256, 192, 128, 64) if n <= most and size % n == 0)
