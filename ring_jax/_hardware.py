"""The one table of hardware facts that every rule of thumb reads: what a GPU computes, moves and holds.

Rates are what this package's own programs reach, measured (docs/measurements, docs/kernels), where a line does not say otherwise; peaks
are the vendor's. `ring_jax.plan` adds up whole passes from them, `ring-jax plan --check` compares that with the machine at hand. Choices
(`auto`, halves of heads, configs) compare two of these figures, so a few percent do not matter.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Hardware:
    """One GPU and the links between it and its neighbours. FLOPs are 2 for each multiply-add; bytes and seconds.

    Attributes:
        name: the vendor's. memory_bytes: that programs can allocate.
        multiprocessors: thread blocks that run at the same time where one fills a multiprocessor.
        shared_memory_bytes: that one thread block may use.
        peak_flops: dense bfloat16, the vendor's figure.
        product_flops: of the model's matrix products, bfloat16, many rows.
        attention_flops: (head size, forward, forward + backward) of the attention block, bfloat16, causal, long sequences.
        attention_copies: of a call, reads and writes of its query, for packed keys and carried arrays: forward, with backward.
        hop_seconds: of a block over ranks, beside its share of the work: forward, forward + backward.
        hop_share: of a block's rate that is left where the work comes in blocks of a ring; of a gather's two blocks.
        float32_flops: of float32 products at highest precision (no TF32).
        gdn_chunk_seconds: of 64 tokens in the gated delta rule's forward kernel, head size 128: half a value head a multiprocessor;
            a whole one. None: XLA's loops run instead.
        gdn_prepare_seconds: of one token and value head, before that.
        gdn_backward: of the gated delta rule's gradients by kernels: seconds of 64 tokens where there are few heads, and of one token
            and value head where there are many. None: XLA's loops, which run the forward again.
        gdn_loops: seconds of 64 tokens in XLA's loops, and more for each value head: forward, forward + backward.
        expert_flops: of routed experts' products, forward; with backward.
        memory_bytes_per_s: the vendor's figure.
        stream_share: of it that element-wise kernels and copies reach; weight_share: that products of few rows reach in a
            decode step, fitted to whole steps with seconds_per_layer.
        gather_bytes_per_s: that a rank receives in an all-gather or permute through NCCL over NVLink.
        ragged_bytes_per_s: that it receives in a ragged all-to-all (assumed: two thirds of that).
        network_bytes_per_s: that a rank receives from another host: one 400 Gb/s link to each GPU, half of it used (assumed).
        host_gpus: GPUs that NVLink joins.
        seconds_per_collective: what a collective costs beside its bytes.
        seconds_per_layer: what a layer costs beside products and bytes: some ten kernels to start (decode).
    """

    name: str
    memory_bytes: float
    multiprocessors: int
    shared_memory_bytes: int
    peak_flops: float
    product_flops: float
    attention_flops: tuple[tuple[int, float, float], ...]
    attention_copies: tuple[float, float]
    hop_seconds: tuple[float, float]
    hop_share: tuple[float, float]
    float32_flops: float
    gdn_chunk_seconds: tuple[float, float] | None
    gdn_prepare_seconds: float
    gdn_backward: tuple[float, float] | None
    gdn_loops: tuple[tuple[float, float], tuple[float, float]]
    expert_flops: tuple[float, float]
    memory_bytes_per_s: float
    stream_share: float
    weight_share: float
    gather_bytes_per_s: float
    ragged_bytes_per_s: float
    network_bytes_per_s: float
    host_gpus: int
    seconds_per_collective: float
    seconds_per_layer: float

    def attention_rate(self, head_size: int, *, backward: bool = False) -> float:
        """FLOP/s of the attention block for a head size: that of the nearest one measured above, of the largest beyond."""
        found = next((x for x in self.attention_flops if x[0] >= head_size), self.attention_flops[-1])
        return found[2 if backward else 1]


H200 = Hardware(
    name="H200",
    memory_bytes=139 * 2**30,
    multiprocessors=132,
    shared_memory_bytes=227 * 1024,
    peak_flops=9.89e14,
    # Of 9B, random weights: 8.6e14 in a pass whose chip idles half of its time, and power binds later:
    # 8192^3 products of normal data reach 7.0e14 to 7.5e14.
    product_flops=6.9e14,
    attention_flops=((64, 5.2e14, 4.4e14), (128, 6.45e14, 6.0e14), (256, 7.0e14, 5.1e14)),
    attention_copies=(3.0, 12.0),
    hop_seconds=(2.0e-5, 7.0e-5),
    hop_share=(0.935, 0.95),
    float32_flops=4.0e13,
    gdn_chunk_seconds=(1.27e-6, 1.9e-6),
    gdn_prepare_seconds=1.43e-10,
    gdn_backward=(1.56e-6, 2.45e-9),  # on an H100
    gdn_loops=((2.36e-5, 8.1e-7), (9.86e-5, 2.72e-6)),
    expert_flops=(6.1e14, 5.3e14),
    memory_bytes_per_s=4.8e12,
    stream_share=0.8,
    weight_share=0.88,
    gather_bytes_per_s=1.5e11,
    ragged_bytes_per_s=1.0e11,
    network_bytes_per_s=2.5e10,
    host_gpus=8,
    seconds_per_collective=3.0e-5,
    seconds_per_layer=2.55e-5,
)
# The same chip with slower memory.
H100 = replace(H200, name="H100", memory_bytes=78 * 2**30, memory_bytes_per_s=3.35e12)
HOPPER = H200
BY_NAME = {"h100": H100, "h200": H200}
