"""Times flash-linear-attention's gated delta rule, forward, with PyTorch alone: run as a file, not as a module of the package.

    python fla_peer.py bfloat16 1x32768x32x16x128 ...       batch x length x value heads x key heads x head size

prints one line of JSON. Its backward is left out: FLA 0.6.0 refuses it on Hopper with Triton 3.4 to 3.7.0.
"""

import json
import statistics
import sys


def main(dtype: str, *shapes: str) -> None:
    import fla  # type: ignore[import-not-found]
    import torch  # type: ignore[import-not-found]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    rows = []
    for shape in shapes:
        batch, length, heads, key_heads, size = (int(number) for number in shape.split("x"))
        keys = batch, length, key_heads, size
        options = {"device": "cuda", "dtype": getattr(torch, dtype)}
        q, k = (
            torch.nn.functional.normalize(torch.randn(keys, device="cuda"), dim=-1).to(options["dtype"])
            for _ in range(2)
        )
        v, beta = torch.randn(batch, length, heads, size, **options), torch.rand(batch, length, heads, **options)
        g = -torch.rand(batch, length, heads, device="cuda")

        @torch.no_grad()
        def call(q=q, k=k, v=v, g=g, beta=beta):
            return chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)

        rows.append({"what": "forward", "name": f"fla {fla.__version__}", "shape": f"{batch}x{length}x{heads}"})
        try:
            rows[-1]["kernels_ms"] = milliseconds(torch, call)
        except Exception as failure:
            rows[-1]["failure"] = f"{type(failure).__name__}: {failure}"[:400]
    print(json.dumps(rows))


def milliseconds(torch, call, rounds: int = 5, queued: int = 10) -> float:
    """Median of rounds of queued calls, between two events on the device."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(queued):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / queued)
    return statistics.median(times)


if __name__ == "__main__":
    main(*sys.argv[1:])
