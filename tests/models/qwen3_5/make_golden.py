"""Writes golden/*.npz from transformers: python -m tests.models.qwen3_5.make_golden [name ...] (extra `parity`)."""

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

from tests.models.qwen3_5 import hf, tiny
from tests.models.qwen3_5.golden import CASES, LENGTHS, NEW_TOKENS, Case, Golden, looked_at

# Far above what reordered float32 sums can move, 1e-5 here.
MARGIN = 5e-4
LARGEST_FILE = 300_000


def make(case: Case) -> Golden:
    weights, tokens = case.weights(), case.tokens()
    with tempfile.TemporaryDirectory() as folder:
        model = hf.load(tiny.write(pathlib.Path(folder), case.config(), weights))
    prompts = [row[:length] for row, length in zip(tokens, LENGTHS, strict=True)]
    prefills = [hf.prefill(model, prompt) for prompt in prompts]
    continued = [hf.continue_greedily(model, prompt, NEW_TOKENS) for prompt in prompts] if case.greedy else []
    check_margins([p.router_margin for p in prefills] + [m for c in continued for m in (c.margin, c.router_margin)])
    rows, positions = looked_at()
    chosen = [positions[rows == row] for row in range(len(LENGTHS))]

    def sampled(name: str, axis: int) -> np.ndarray:
        parts = [np.take(getattr(p, name), at, axis) for p, at in zip(prefills, chosen, strict=True)]
        return np.concatenate(parts, axis)

    stride = case.state_stride
    return Golden(
        rows=rows,
        positions=positions,
        logits=sampled("logits", 0),
        hidden=sampled("hidden", 1),
        keys=sampled("keys", 1),
        values=sampled("values", 1),
        states=np.stack([p.states for p in prefills], 1)[..., ::stride, ::stride],
        tails=np.stack([p.tails for p in prefills], 1),
        greedy=np.stack([c.tokens for c in continued]) if continued else np.zeros((0, 0), np.int32),
        fingerprint=tiny.fingerprint(weights),
        versions=np.array([transformers.__version__, torch.__version__]),
    )


def check_margins(margins: list[float]) -> None:
    if min(margins) < MARGIN:
        raise RuntimeError(f"a choice is decided by {min(margins):.1e}, below {MARGIN}: take another seed")


def main(names: list[str]) -> None:
    torch.set_num_threads(1)  # another number of threads sums in another order
    for name in names or CASES:
        path = make(CASES[name]).save(name)
        size = path.stat().st_size
        print(f"{path.name}: {size:,} bytes")
        if size > LARGEST_FILE:
            raise RuntimeError(f"{path.name} is larger than {LARGEST_FILE:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
