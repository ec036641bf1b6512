"""Golden files: what transformers computes for the tiny models, stored where the tests are so that they need no torch.

`make_golden.py` writes them. Weights are not stored, they follow from the seed (`tiny.weights`).
"""

import dataclasses
import pathlib

import numpy as np

from tests.models.qwen3_5 import tiny

FOLDER = pathlib.Path(__file__).parent / "golden"
LENGTHS = (150, 90, 5)  # of the rows; those of 8 ranks' zigzag do not divide
NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One tiny model. Seeds were searched for routers and greedy choices without near-ties."""

    family: str
    seed: int
    decays: bool = True
    greedy: bool = False
    layers: int = 4
    period: int = 4

    def config(self) -> dict:
        return tiny.config(self.family, layers=self.layers, period=self.period)

    def weights(self) -> tiny.Tensors:
        return tiny.weights(self.config(), self.seed, decays=self.decays)

    def tokens(self) -> np.ndarray:
        """[rows, longest row] int32; what lies beyond a row's length is arbitrary on purpose."""
        rng = np.random.default_rng(self.seed)
        return rng.integers(0, self.config()["vocab_size"], (len(LENGTHS), max(LENGTHS)), dtype=np.int32)

    @property
    def state_stride(self) -> int:
        """Large states are stored at every so many-th key and value feature."""
        return max(1, self.config()["linear_key_head_dim"] // 16)


CASES = {
    "dense": Case("dense", 2, greedy=True),
    "dense_no_decay": Case("dense", 3, decays=False),
    "moe": Case("moe", 25, greedy=True),
    "next": Case("next", 10, greedy=True),
    "next_raw": Case("next_raw", 5),
    "head256": Case("head256", 0),
}
# One GDN and one full layer, without golden files: for comparisons of ours with ours that take long to compile.
PAIRS = {f"{family} pair": Case(family, 2, layers=2, period=2) for family in ("dense", "moe")}


@dataclasses.dataclass(frozen=True)
class Golden:
    """The arrays of one file. P = positions looked at, over all rows; layers in checkpoint order."""

    rows: np.ndarray  # [P] row of each position looked at
    positions: np.ndarray  # [P]
    logits: np.ndarray  # [P, V]
    hidden: np.ndarray  # [L, P, D]
    keys: np.ndarray  # [full layers, P, K, H]
    values: np.ndarray  # [full layers, P, K, H]
    states: np.ndarray  # [GDN layers, rows, N, dk / stride, dv / stride]
    tails: np.ndarray  # [GDN layers, rows, W - 1, F]
    greedy: np.ndarray  # [rows, NEW_TOKENS] int32, or [0, 0]
    fingerprint: np.ndarray  # of the weights
    versions: np.ndarray  # of transformers and torch, text

    def save(self, name: str) -> pathlib.Path:
        FOLDER.mkdir(exist_ok=True)
        np.savez_compressed(FOLDER / f"{name}.npz", **dataclasses.asdict(self))
        return FOLDER / f"{name}.npz"

    @classmethod
    def load(cls, name: str) -> "Golden":
        with np.load(FOLDER / f"{name}.npz") as arrays:
            return cls(**arrays)


def looked_at() -> tuple[np.ndarray, np.ndarray]:
    """Rows and positions that are stored: both ends of each row, the 64-token chunk's border, some in between."""
    rng, rows, positions = np.random.default_rng(0), [], []
    for row, length in enumerate(LENGTHS):
        wanted = {0, 1, 2, 3, 63, 64, 65, length - 2, length - 1, *rng.integers(0, length, length // 7).tolist()}
        chosen = sorted(p for p in wanted if p < length)
        rows += [row] * len(chosen)
        positions += chosen
    return np.array(rows, np.int32), np.array(positions, np.int32)
