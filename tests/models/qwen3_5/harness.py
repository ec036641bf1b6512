"""Our model on a tiny checkpoint, spread over any mesh, and its results in the order that the oracle has them."""

import atexit
import dataclasses
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from ring_jax import ContextParallel
from ring_jax.models.qwen3_5 import Cache, Output, Qwen3_5, Sharding
from tests.gdn.helpers import jit
from tests.models.qwen3_5 import tiny
from tests.models.qwen3_5.golden import CASES, LENGTHS, NEW_TOKENS, PAIRS, Golden

# Absolute and relative L2 bounds of float32 against float32.
MOST, RELATIVE = 1e-4, 1e-5
STATE_RELATIVE = 5e-6
ROWS = tuple(range(len(LENGTHS)))
KNOWN = CASES | PAIRS


@dataclasses.dataclass(frozen=True)
class Spread:
    """Sizes of the mesh axes (0: no such axis) and what lies over them. The default is one device without a mesh.

    shared: calls the model Qwen3.5 MoE, which Qwen3-Next is but for its checkpoint: both then run one program.
    """

    context: int = 0
    data: int = 0
    tensor: int = 0
    expert: str | None = None
    weights: str | None = None
    way: str = "auto"
    layout: str = "zigzag"
    strategy: str = "auto"
    kind: AxisType = AxisType.Auto
    shared: bool = False

    def sharding(self) -> Sharding | None:
        if not self.context:
            return None
        sizes = {"data": self.data, "context": self.context, "tensor": self.tensor}
        sizes = {name: size for name, size in sizes.items() if size}
        count = int(np.prod(list(sizes.values())))
        mesh = jax.make_mesh(
            tuple(sizes.values()), tuple(sizes), axis_types=(self.kind,) * len(sizes), devices=jax.devices()[:count]
        )
        context = ContextParallel(
            "context",
            layout=self.layout,
            batch_axis="data" if self.data else None,
            head_axis="tensor" if self.tensor else None,
            mesh=mesh,
            strategy=self.strategy,
        )
        return Sharding(context, expert=self.expert, weights=self.weights, gdn_strategy=self.way)


def ranks(count: int) -> Spread:
    """The context axis alone; one rank takes no mesh."""
    return Spread() if count == 1 else Spread(context=count)


@functools.cache
def checkpoint(name: str) -> pathlib.Path:
    """The checkpoint of a case."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ring-jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return tiny.write(folder, KNOWN[name].config(), KNOWN[name].weights())


@functools.cache
def model(name: str, spread: Spread, remat: str | None = None) -> Qwen3_5:
    loaded = Qwen3_5.from_pretrained(checkpoint(name), sharding=spread.sharding(), remat=remat)
    if not spread.shared:
        return loaded
    config = dataclasses.replace(loaded.config, family="qwen3_5_moe")
    same = Qwen3_5(config, rngs=None, dtype=loaded.dtype, sharding=loaded.sharding, remat=remat)
    same.set_parameters(nnx.to_pure_dict(nnx.state(loaded, nnx.Param)))
    return same


@functools.cache
def prefill(name: str, spread: Spread, rows: tuple[int, ...] = ROWS) -> Output:
    """Everything about rows of a golden case: the one program that most tests share."""
    graph, state = nnx.split(model(name, spread))
    tokens, lengths = (x[list(rows)] for x in (KNOWN[name].tokens(), np.asarray(LENGTHS, np.int32)))
    return _prefill(graph)(state, tokens, lengths)


@functools.cache
def _prefill(graph):
    options = {"cache_room": NEW_TOKENS, "return_hidden": True}
    return jit(lambda state, tokens, lengths: nnx.merge(graph, state)(tokens, lengths=lengths, **options))


def decoder(name: str, spread: Spread) -> Callable[[np.ndarray, Cache], tuple[np.ndarray, Cache]]:
    """`model.decode`, compiled."""
    graph, state = nnx.split(model(name, spread))
    return functools.partial(_decode(graph), state)


@functools.cache
def _decode(graph):
    return jit(lambda state, token, cache: nnx.merge(graph, state).decode(token, cache))


def check_prefill(name: str, spread: Spread, rows: tuple[int, ...] = ROWS) -> None:
    """Logits, hidden states and caches against the golden file."""
    golden, out = Golden.load(name), prefill(name, spread, rows)
    keys, values = keys_and_values(out, spread)
    states, tails = states_and_tails(name, out, spread)
    stride = CASES[name].state_stride
    for row, case in enumerate(rows):
        at = golden.rows == case
        place = row, golden.positions[at]
        close("logits", np.asarray(out.logits)[place], golden.logits[at])
        for n, wanted in enumerate(golden.hidden):
            close(f"hidden state of layer {n}", np.asarray(out.hidden[n])[place], wanted[at])
        close("keys", keys[:, *place], golden.keys[:, at])
        close("values", values[:, *place], golden.values[:, at])
        for n, wanted in enumerate(golden.states[:, case]):
            close(f"state of GDN layer {n}", states[n, row, :, ::stride, ::stride], wanted, relative=STATE_RELATIVE)
        close("convolution tails", tails[:, row], golden.tails[:, case])


def check_greedy(name: str, spread: Spread, rows: tuple[int, ...] = ROWS) -> None:
    """64 tokens, token for token, after prompts of three lengths in one batch."""
    wanted = Golden.load(name).greedy
    assert wanted.shape == (len(LENGTHS), 64)
    np.testing.assert_array_equal(greedy(name, spread, rows), wanted[list(rows)])


def greedy(name: str, spread: Spread, rows: tuple[int, ...] = ROWS) -> np.ndarray:
    """[rows, NEW_TOKENS] tokens, each the most likely after those before."""
    out, decode = prefill(name, spread, rows), decoder(name, spread)
    last = np.asarray(LENGTHS)[list(rows)] - 1
    token, cache = np.asarray(out.logits)[np.arange(len(rows)), last].argmax(-1), out.cache
    tokens = [token]
    for _ in range(NEW_TOKENS - 1):
        logits, cache = decode(token.astype(np.int32), cache)
        tokens.append(token := np.asarray(logits).argmax(-1))
    return np.stack(tokens, 1)


def keys_and_values(out: Output, spread: Spread) -> tuple[np.ndarray, np.ndarray]:
    """Each [full layers, B, S, K, H], positions in natural order, layers in checkpoint order."""
    packed, sharding = np.asarray(out.cache.prompt), spread.sharding()  # [G, L, 2, B, S, K, H]
    if sharding is not None:
        packed = natural_order(packed, 4, sharding.context.layout, spread.context)
    packed = packed.reshape(-1, *packed.shape[2:])[:, :, :, : out.hidden.shape[2]]
    return packed[:, 0], packed[:, 1]


def natural_order(x: np.ndarray, axis: int, layout, count: int) -> np.ndarray:
    """`x` with positions ascending, from the order that `layout` gives them over `count` ranks."""
    length = x.shape[axis]
    order = np.concatenate([np.asarray(layout.positions(rank, length, count)) for rank in range(count)])
    return np.take(x, np.argsort(order), axis)


def states_and_tails(name: str, out: Output, spread: Spread) -> tuple[np.ndarray, np.ndarray]:
    """[GDN layers, B, N, dk, dv] and [GDN layers, B, W - 1, F], in checkpoint order."""
    state, tail = (np.asarray(x) for x in (out.cache.gdn.state, out.cache.gdn.tail))
    if spread.tensor:  # tensor ranks hold q | k | v of their own heads
        shares = np.split(tail, spread.tensor, axis=-1)
        parts = model(name, spread).config.linear.share(spread.tensor).parts
        by_part = zip(*(np.split(share, np.cumsum(parts)[:-1], axis=-1) for share in shares), strict=True)
        tail = np.concatenate([share for part in by_part for share in part], axis=-1)
    return state.reshape(-1, *state.shape[2:]), tail.reshape(-1, *tail.shape[2:])


def close(what: str, found, wanted, *, most: float | None = MOST, relative: float = RELATIVE) -> None:
    """Asserts both bounds; the message names the quantity and what was found."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, f"{what}: {found.shape} is not {wanted.shape}"
    difference = np.linalg.norm(found - wanted)
    error = difference / np.linalg.norm(wanted)
    largest = np.abs(found - wanted).max()
    assert error <= relative, f"{what}: relative L2 {error:.2e} (largest {largest:.2e}) exceeds {relative}"
    if most is not None:
        assert largest <= most, f"{what}: largest difference {largest:.2e} exceeds {most}"
