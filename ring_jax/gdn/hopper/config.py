"""Tuning parameters of the Hopper kernels of the gated delta rule, validated when made."""

import dataclasses

CHUNK = 64
SHARED_MEMORY_BYTES = 227 * 1024
_BARRIER_BYTES = 1024
GATE_ROWS = 4  # see `gates`


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """How the forward kernel cuts its work.

    Attributes:
        state_warpgroups: each keeps 64 columns of a value head's state, so a thread block serves 64 times as many.
        stages: chunks in flight in shared memory.
        state_registers: registers per thread of the state warpgroups (setmaxnreg).
        scores_registers: of the warpgroup that computes Q K^T.
    """

    state_warpgroups: int
    stages: int = 3
    state_registers: int = 192
    scores_registers: int = 104
    memory_registers: int = 24
    pipelined: bool = True

    def __post_init__(self):
        if self.state_warpgroups not in (1, 2):
            raise ValueError(f"{self.state_warpgroups=} must be 1 or 2")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2")
        for name in ("state_registers", "scores_registers", "memory_registers"):
            if getattr(self, name) % 8 or not 24 <= getattr(self, name) <= 248:
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of 8 from 24 to 248")
        total = self.state_warpgroups * self.state_registers + self.scores_registers + self.memory_registers
        if total * 128 > 65536:
            raise ValueError(f"{self} needs {total * 128} registers, a multiprocessor has 65536")

    @property
    def value_columns(self) -> int:
        """Columns of a value head that one thread block serves."""
        return 64 * self.state_warpgroups

    def shared_memory_bytes(self, key_size: int) -> int:
        """Bytes of shared memory for 16-bit inputs."""
        tile = CHUNK * 2
        stage = 2 * tile * key_size + tile * self.value_columns + tile * CHUNK + GATE_ROWS * CHUNK * 4 + CHUNK * 4
        return self.stages * stage + 2 * tile * CHUNK + 2 * tile * self.value_columns + _BARRIER_BYTES


def forward_config(key_size: int, value_size: int, rows: int, multiprocessors: int = 132) -> ForwardConfig:
    """The config for head sizes and for `rows` = batch x value heads.

    Two state warpgroups share what one thread block loads; one in each of two thread blocks uses twice as many
    multiprocessors, which is faster wherever there are that many.
    """
    if value_size % 128 == 0 and 2 * rows > multiprocessors:
        return ForwardConfig(state_warpgroups=2, state_registers=200, scores_registers=88, pipelined=False)
    return ForwardConfig(state_warpgroups=1, state_registers=240)
