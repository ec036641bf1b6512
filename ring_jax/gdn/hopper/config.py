"""Tuning parameters of the Hopper kernels of the gated delta rule, validated when made."""

import dataclasses
import math

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
        warpgroups = self.state_warpgroups + 2
        # What a program starts with, in steps of 8 a thread, is all that its warpgroups can share.
        if total > (available := 512 // warpgroups // 8 * 8 * warpgroups):
            raise ValueError(
                f"{self} needs {total} registers a thread of {warpgroups} warpgroups, there are {available}"
            )

    @property
    def value_columns(self) -> int:
        """Columns of a value head that one thread block serves."""
        return 64 * self.state_warpgroups

    def shared_memory_bytes(self, key_size: int) -> int:
        """Bytes of shared memory for 16-bit inputs."""
        tile = CHUNK * 2
        stage = 2 * tile * key_size + tile * self.value_columns + tile * CHUNK + GATE_ROWS * CHUNK * 4 + CHUNK * 4
        return self.stages * stage + 2 * tile * CHUNK + 2 * tile * self.value_columns + _BARRIER_BYTES


# Microseconds a chunk takes a thread block, by its state warpgroups, and in `transition_kernel`; of one step from piece to
# piece, and of the launches around them (H200, bfloat16, head size 128).
_FORWARD_CHUNK = {1: 1.26, 2: 1.9}
_TRANSITION_CHUNK = 1.3
_STEP, _LAUNCHES = 10.0, 15.0
_MAX_PIECES = 16


def forward_config(key_size: int, value_size: int, rows: int, chunks: int, multiprocessors: int = 132):
    """(config, pieces of the sequence) for head sizes and for `rows` = batch x value heads of `chunks` chunks.

    Two state warpgroups share what one thread block loads; one in each of two thread blocks uses twice as many
    multiprocessors, which is faster wherever there are that many. Where there are many more, the sequence is cut in pieces that
    run at the same time, once their transitions are known, which is about as much work again.
    """
    narrow = ForwardConfig(state_warpgroups=1, state_registers=240)
    wide = ForwardConfig(state_warpgroups=2, state_registers=200, scores_registers=88, pipelined=False)
    configs = [narrow, wide] if value_size % 128 == 0 else [narrow]

    def waves(blocks):
        return math.ceil(blocks / multiprocessors)

    def microseconds(choice):
        config, pieces = choice
        length = math.ceil(chunks / pieces)
        blocks = rows * (value_size // config.value_columns) * pieces
        total = waves(blocks) * length * _FORWARD_CHUNK[config.state_warpgroups]
        if pieces > 1:
            blocks = rows * (pieces - 1) * math.ceil((key_size + value_size) / 128)
            total += waves(blocks) * length * _TRANSITION_CHUNK + (pieces - 1) * _STEP + _LAUNCHES
        return total

    most = max(1, min(_MAX_PIECES, chunks // 8))
    return min(((config, pieces) for pieces in range(1, most + 1) for config in configs), key=microseconds)
