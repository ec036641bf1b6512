"""Tuning parameters of the Hopper flash-attention forward kernel, validated when made."""

import dataclasses

from ring_jax._hardware import HOPPER

SHARED_MEMORY_BYTES = HOPPER.shared_memory_bytes
_BARRIER_BYTES = 1024
# Per thread of a compute warpgroup, by their number, and of the memory warpgroup (setmaxnreg).
REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """How the forward kernel cuts its work.

    Attributes:
        block_kv: keys per tile; a multiple of 16, at most 256.
        stages: K tiles, and as many V tiles, in flight in shared memory.
        warpgroups: compute warpgroups; each holds 64 query rows, so a query tile has 64 * warpgroups rows.
        overlap: issue Q K of the next tile before the softmax of the current one (within a warpgroup).
        ping_pong: let the warpgroups take turns at issuing matrix products.
        lazy_rescale: move the softmax reference only when the row maximum has grown by more than 8 bits, and skip the
            rescaling of the accumulator where no row of a warp has moved.
        tiles_per_block: query tiles that a thread block walks over, so that one tile's stores hide behind the next one's loads; None
            leaves it to `Problem.tiles_per_block`.
        kv_bytes_in_flight: query tiles are walked in sections of heads whose K and V fit this many bytes of L2.
    """

    block_kv: int
    stages: int
    warpgroups: int = 2
    overlap: bool = True
    ping_pong: bool = True
    lazy_rescale: bool = True
    tiles_per_block: int | None = None
    kv_bytes_in_flight: int = 24 * 2**20

    def __post_init__(self) -> None:
        if self.block_kv % 16 or not 16 <= self.block_kv <= 256:
            raise ValueError(f"{self.block_kv=} must be a multiple of 16, at most 256")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2")
        if self.warpgroups not in (1, 2, 3):
            raise ValueError(f"{self.warpgroups=} must be 1, 2 or 3")
        if self.tiles_per_block is not None and self.tiles_per_block < 1:
            raise ValueError(f"{self.tiles_per_block=} must be positive")

    @property
    def block_q(self) -> int:
        return 64 * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Registers per thread of the compute and the memory warpgroups (setmaxnreg)."""
        return REGISTERS[self.warpgroups]

    def shared_memory_bytes(self, head_size: int, value_head_size: int) -> int:
        """Bytes of shared memory for 16-bit inputs."""
        kv_bytes = self.stages * self.block_kv * (head_size + value_head_size) * 2
        return self.block_q * head_size * 2 + kv_bytes + _BARRIER_BYTES


def forward_config(head_size: int, value_head_size: int) -> ForwardConfig:
    """The config that is used for these head sizes (multiples of 64, at most 256).

    Again on two H200s on 2026-11-27, with slots that are constants, ratio to FlashAttention-4 (queued for 80 ms after 80 ms of the same):
    head 64 (32/8, 16K, full, causal): overlapped with four stages 0.96, 0.95, without ping-pong 0.97, 0.95, two warpgroups 0.81, 0.85;
    head 128 (32/8, 8K full, causal, 32K full, causal): 128 keys 0.95, 0.98, 1.00, 0.98, 144 keys 0.93, 1.03, 0.97, 0.99.
    Before, chosen on one H200 (bf16, batch 1, jax 0.11.2, 2026-11-22), as the ratio to cuDNN's time in the same process, with
    lazy rescaling (without it in parentheses):
    head 64 (32/8 heads, 16K, full): in turn 1.08 (1.07), overlapped 0.89, two warpgroups with 192 keys 0.93;
    head 128 (32/8, 8K, full, causal): 128 keys 1.02, 1.16 (0.98, 1.12), 160 keys 1.03, 1.14, 176 keys 1.00, 1.10,
    no ping-pong 1.02, 1.15;
    head 256 (32/2, 8K, causal): 80 keys 1.20 (1.19), 64 keys 1.19; with ping-pong the same.
    """
    size = max(head_size, value_head_size)
    if size <= 64:
        return ForwardConfig(block_kv=128, stages=4, warpgroups=3, ping_pong=False)
    if size <= 128:
        return ForwardConfig(block_kv=128, stages=2)
    if size <= 192:
        return ForwardConfig(block_kv=96, stages=2, ping_pong=False)
    if size <= 256:
        return ForwardConfig(block_kv=80, stages=2, ping_pong=False)
    raise ValueError(f"no config for head sizes {head_size} and {value_head_size}: at most 256")
