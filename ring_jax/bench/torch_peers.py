"""Times kernels of other packages, with PyTorch alone: run as a file by `run`, in a process without jax.

    python torch_peers.py fla bfloat16 1x32768x32x16x128 ...       batch x length x value heads x key heads x head size
    python torch_peers.py fa4 bfloat16 1x8192x32x8x128xcausal ...  batch x length x heads x key heads x head size x full or causal
    python torch_peers.py transformers bfloat16 1xprefillx8192xFILE ...  batch x prefill or decode x prompt length x config.json

prints one line of JSON. `fla` is flash-linear-attention's gated delta rule, forward: FLA 0.6.0 refuses its backward on Hopper with
Triton 3.4 to 3.7.0. `fa4` is FlashAttention-4 (`flash-attn-4`), forward, and with its backward. `transformers` is a whole model with
random weights, which takes FLA's kernels where they are installed; decode is a call for one token after the prompt.
"""

import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def run(peer: str, dtype: str, shapes: Sequence[str]) -> list[dict[str, Any]]:
    """What the peer takes for these shapes, in its own process; rows with "failure" where it does not run."""
    command = [sys.executable, __file__, peer, dtype, *shapes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        return [{"name": peer, "failure": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}]
    return json.loads(done.stdout.splitlines()[-1])


def main(peer: str, dtype: str, *shapes: str) -> None:
    import torch  # type: ignore[import-not-found]

    rows = []
    for shape in shapes:
        for what, name, call in PEERS[peer](torch, dtype, shape):
            rows.append({"what": what, "name": name, "shape": shape})
            try:
                rows[-1]["kernels_ms"] = milliseconds(torch, call)
            except Exception as failure:
                rows[-1]["failure"] = f"{type(failure).__name__}: {failure}"[:400]
    print(json.dumps(rows))


def fla(torch: Any, dtype: str, shape: str) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    import fla as package  # type: ignore[import-not-found]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    batch, length, heads, key_heads, size = map(int, shape.split("x"))
    options = {"device": "cuda", "dtype": getattr(torch, dtype)}
    q, k = (
        torch.nn.functional.normalize(torch.randn(batch, length, key_heads, size, device="cuda"), dim=-1).to(
            options["dtype"]
        )
        for _ in range(2)
    )
    v, beta = torch.randn(batch, length, heads, size, **options), torch.rand(batch, length, heads, **options)
    g = -torch.rand(batch, length, heads, device="cuda")

    @torch.no_grad()
    def forward():
        return chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)

    yield "forward", f"fla {package.__version__}", forward


def fa4(torch: Any, dtype: str, shape: str) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    from importlib.metadata import version

    from flash_attn.cute.interface import flash_attn_func  # type: ignore[import-not-found]

    *sizes, mask = shape.split("x")
    batch, length, heads, kv_heads, size = map(int, sizes)
    options = {"device": "cuda", "dtype": getattr(torch, dtype)}
    query, grad = (torch.randn(batch, length, heads, size, **options) for _ in range(2))
    key, value = (torch.randn(batch, length, kv_heads, size, **options) for _ in range(2))
    learned = [x.requires_grad_() for x in (query, key, value)]

    def out():
        return flash_attn_func(query, key, value, causal=mask == "causal")[0]

    name = f"fa4 {version('flash-attn-4')}"
    yield "forward", name, torch.no_grad()(out)
    yield "forward+backward", name, lambda: torch.autograd.grad(out(), learned, grad)


def transformers(torch: Any, dtype: str, shape: str) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    from importlib.metadata import version

    batch, what, length, path = shape.split("x", 3)
    model = _model(torch, dtype, path)
    tokens = torch.randint(0, model.config.vocab_size, (int(batch), int(length)), device=model.device)

    @torch.inference_mode()
    def prefill():
        return model(tokens, use_cache=True, logits_to_keep=1)

    cache = prefill().past_key_values if what == "decode" else None

    @torch.inference_mode()
    def decode():
        return model(tokens[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)

    fla = f" + fla {version('flash-linear-attention')}" if importlib.util.find_spec("fla") else ", without fla"
    yield what, f"transformers {version('transformers')}{fla}", {"prefill": prefill, "decode": decode}[what]


@functools.cache
def _model(torch: Any, dtype: str, path: str) -> Any:
    """A causal language model of the config at `path`, with transformers' random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM  # type: ignore[import-not-found]

    with open(path) as file:
        values = json.load(file)
    config = AutoConfig.for_model(**values)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config).eval()


PEERS = {"fla": fla, "fa4": fa4, "transformers": transformers}


def milliseconds(torch: Any, call: Callable[[], Any], rounds: int = 5, most: int = 10) -> float:
    """Median of rounds of queued calls, as many as take 0.2 s but at most `most`, between two events on the device."""
    for _ in range(3):
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        once = time.perf_counter() - begin
    queued, times = max(1, min(most, int(0.2 / once))), []
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
