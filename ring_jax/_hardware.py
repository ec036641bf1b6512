"""The one table of hardware facts that every rule of thumb reads: what a GPU computes, moves and holds.

Rates are what this package's own programs reach, measured (docs/measurements), where a line does not say otherwise; peaks are the
vendor's. Choices made from them (`auto`, halves of heads, configs) compare two of these figures, so a few percent do not matter.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One GPU and the links between it and its neighbours. FLOPs are 2 for each multiply-add; bytes and seconds.

    Attributes:
        multiprocessors: thread blocks that run at the same time where one fills a multiprocessor.
        shared_memory_bytes: that one thread block may use.
        peak_flops: dense bfloat16, the vendor's figure.
        attention_flops: of the attention block, bfloat16, head size 128.
        float32_flops: of float32 products at highest precision (no TF32).
        memory_bytes_per_s: the vendor's figure.
        gather_bytes_per_s: that a rank receives in an all-gather or permute through NCCL over NVLink.
        network_bytes_per_s: that a rank receives from another host: one 400 Gb/s link to each GPU, half of it used (assumed).
        seconds_per_collective: what a collective costs beside its bytes.
    """

    multiprocessors: int
    shared_memory_bytes: int
    peak_flops: float
    attention_flops: float
    float32_flops: float
    memory_bytes_per_s: float
    gather_bytes_per_s: float
    network_bytes_per_s: float
    seconds_per_collective: float


# H200; the H100 is the same chip with memory of 3.35e12 bytes/s.
HOPPER = Hardware(
    multiprocessors=132,
    shared_memory_bytes=227 * 1024,
    peak_flops=9.89e14,
    attention_flops=5.55e14,
    float32_flops=4.0e13,
    memory_bytes_per_s=4.8e12,
    gather_bytes_per_s=1.5e11,
    network_bytes_per_s=2.5e10,
    seconds_per_collective=3.0e-5,
)
