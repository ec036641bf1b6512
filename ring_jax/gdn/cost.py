"""What each strategy to spread the gated delta rule over ranks moves and multiplies, and which one `auto` takes.

Bytes are those that one rank receives, FLOPs those that one rank executes (2 for each multiply-add), for one forward
pass of a run of layers: the mixers only, without projections. `batch` also gives every rank whole rows of whatever
else runs between its two all-to-alls, which costs nothing unless rows are padded; where they are, `Cost.beside` counts the
products that padding adds. Time is that of the Hopper kernels, which depends on how many multiprocessors find a head to work on.
"""

import math
from dataclasses import dataclass

from ring_jax._checks import check_count, check_instance, check_number
from ring_jax._hardware import HOPPER, Hardware
from ring_jax._repr import figure
from ring_jax.gdn.chunked import CHUNK
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.state_scan import GATHER_RANKS
from ring_jax.layout import Contiguous, Layout, Zigzag, as_layout

STRATEGIES = ("batch", "head", "state")  # to spread a sequence over ranks, see `ring_jax.gdn.partition`


@dataclass(frozen=True)
class Rates:
    """Rates that weigh bytes against arithmetic: an H200's kernels, and NCCL over NVLink.

    Fields:
        flops_per_second: of the rule; None for the measured time of the Hopper kernels. Where XLA's loops run instead, give
            theirs (`_hardware.HOPPER.float32_flops`, at best).
        bytes_per_second: that a rank receives. seconds_per_collective: beside its bytes.
    """

    flops_per_second: float | None = None
    bytes_per_second: float = HOPPER.gather_bytes_per_s
    seconds_per_collective: float = HOPPER.seconds_per_collective

    def __post_init__(self) -> None:
        if self.flops_per_second is not None:
            check_number("Rates(flops_per_second=...)", self.flops_per_second, above=0)
        check_number("Rates(bytes_per_second=...)", self.bytes_per_second, above=0)
        check_number("Rates(seconds_per_collective=...)", self.seconds_per_collective, low=0)


BETWEEN_HOSTS = Rates(bytes_per_second=HOPPER.network_bytes_per_s)


@dataclass(frozen=True)
class GDNShape:
    """A run of GDN layers, as its cost depends on it.

    Fields:
        batch: rows on one context group (after any batch axis took its share).
        length: tokens of a row over all ranks, padding included.
        heads: numbers and sizes of heads.
        width: D of the layer input; 0 for the bare operation on projected heads.
        conv_width: W; 1 for none.
        layers: GDN layers in the run.
        itemsize: bytes of one activation.
    """

    batch: int
    length: int
    heads: Heads
    width: int = 0
    conv_width: int = 4
    layers: int = 1
    itemsize: int = 2

    def __post_init__(self) -> None:
        check_instance("GDNShape(heads=...)", self.heads, Heads, "ring_jax.gdn.Heads")
        least = {"batch": 0, "length": 0, "width": 0, "conv_width": 1, "layers": 1, "itemsize": 1}
        for name, low in least.items():
            check_count(f"GDNShape({name}=...)", getattr(self, name), low)


@dataclass(frozen=True)
class Cost:
    """Of one strategy, for one rank and one forward pass.

    Fields:
        bytes, flops, collectives: received, executed, started.
        obstacle: why it cannot run here, None if it can.
        kernel_seconds: of the rule in the Hopper kernels. beside: FLOPs of other products on rows that only pad.
    """

    bytes: float
    flops: float
    collectives: int
    obstacle: str | None = None
    kernel_seconds: float = 0.0
    beside: float = 0.0

    def seconds(self, rates: Rates = Rates()) -> float:  # noqa: B008 (a frozen value)
        """Rough time, nothing overlapped."""
        check_instance("rates", rates, Rates, "ring_jax.gdn.cost.Rates")
        moving = self.bytes / rates.bytes_per_second + self.collectives * rates.seconds_per_collective
        rate = rates.flops_per_second
        rule = self.kernel_seconds if rate is None else self.flops / rate
        return moving + rule + self.beside / HOPPER.product_flops


def costs(shape: GDNShape, ranks: int, layout: Layout | str = "contiguous", gpu: Hardware = HOPPER) -> dict[str, Cost]:
    """What each strategy moves and multiplies for a shape on `ranks` context ranks of some GPU.

    Example:
        >>> shape = GDNShape(batch=1, length=1 << 20, heads=Heads(16, 32, 128, 128), width=2048, layers=3)
        >>> found = costs(shape, 8, "zigzag")
        >>> found["state"].bytes < found["head"].bytes / 50
        True
        >>> costs(shape, 8, "striped")["state"].obstacle is None
        False
    """
    check_instance("shape", shape, GDNShape, "a ring_jax.gdn.GDNShape")
    check_count("ranks", ranks, 1)
    check_instance("gpu", gpu, Hardware, "a ring_jax.plan.Hardware")
    layout = as_layout(layout)
    return {
        "batch": _batch_cost(shape, ranks, gpu),
        "head": _head_cost(shape, ranks, gpu),
        "state": _state_cost(shape, ranks, layout, gpu),
    }


def choose_strategy(
    shape: GDNShape,
    ranks: int,
    layout: Layout | str = "contiguous",
    rates: Rates = Rates(),  # noqa: B008
) -> tuple[str, str]:
    """The strategy that `auto` takes, and why: the least `Cost.seconds` among those that can run.

    In words: `batch` where rows divide over the ranks and links are fast; else `state` (twice the FLOPs of the rule, next to no
    bytes), or `head` for short rows where heads divide; `batch` for few rows, which it leaves whole on a few ranks, only where a
    layout is too fine for `state` and heads do not divide.

    Example:
        >>> heads = Heads(16, 32, 128, 128)
        >>> one_row = GDNShape(batch=1, length=1 << 20, heads=heads, width=2048, layers=3)
        >>> choose_strategy(one_row, 8)[0], choose_strategy(one_row, 32)[0], choose_strategy(one_row, 8, rates=BETWEEN_HOSTS)[0]
        ('state', 'state', 'state')
        >>> choose_strategy(GDNShape(batch=64, length=8192, heads=heads, width=2048, layers=3), 4)[0]
        'batch'
    """
    found = costs(shape, ranks, layout)
    able = {name: cost for name, cost in found.items() if cost.obstacle is None}
    # Memory of a rank would not fall with their number.
    if len(able) > 1 and math.ceil(shape.batch / ranks) * ranks > _PADDED * shape.batch:
        del able["batch"]
    best = min(able, key=lambda name: able[name].seconds(rates))
    words = []
    for name, cost in found.items():
        padded = f" and {figure(cost.beside / 1e9)} for padding" if cost.beside else ""
        work = f"{figure(cost.bytes / 2**20)} MiB, {figure(cost.flops / 1e9)} GFLOP{padded}"
        figures = f"{work}, about {figure(cost.seconds(rates) * 1e3)} ms"
        words.append(f"{name}: {cost.obstacle or figures}")
    return best, "; ".join(words)


def gathers_input(heads: Heads, width: int, ranks: int) -> bool:
    """Whether `head` moves fewer bytes by gathering the layer input (width D) than by splitting its projections.

    Per token of the sequence a rank receives D elements of input, or 1/C of the projections' features.
    """
    return width * ranks <= heads.features + 2 * heads.value_heads


# Up to so many times the rows of a batch, padding included, `batch` is worth what it costs.
_PADDED = 1.5


def rule_flops(tokens: float, heads: Heads, *, extra: int = 0, outputs: bool = True) -> float:
    """FLOPs of the chunked gated delta rule over `tokens` tokens.

    Args:
        tokens: of all rows together.
        heads: numbers and sizes of heads.
        extra: columns of a wider state that is only carried (d_k for a transition).
        outputs: whether outputs are formed, not only the state.
    """
    dk, dv = heads.key_size, heads.value_size
    per_key_head = CHUNK * dk * (2 if outputs else 1)  # K K^T and Q K^T
    # Sums of decays, the inverse (blocks of 8 to 64), U, W, and the state's two products.
    per_value_head = CHUNK * CHUNK + 4 * 8 * 8 + 8 * 8 * (1 + 4 + 16) + CHUNK * (dk + dv) + 2 * dk * (dv + extra)
    if outputs:
        per_value_head += dk * dv + CHUNK * dv
    return 2.0 * tokens * (heads.key_heads * per_key_head + heads.value_heads * per_value_head)


def kernel_seconds(tokens: float, rows: float, heads: Heads, *, outputs: bool = True, gpu: Hardware = HOPPER) -> float:
    """Time of the Hopper forward kernel over `rows` sequences of `tokens` tokens; without outputs, of a transition.

    A multiprocessor walks over the chunks of one value head, or of half of one; with few heads a sequence is cut in pieces, whose
    transitions are a pass of their own (docs/kernels/gdn.md).
    """
    streams, chunks = rows * heads.value_heads, math.ceil(tokens / CHUNK)
    if gpu.gdn_chunk_seconds is None:
        return chunks * (gpu.gdn_loops[0][0] + gpu.gdn_loops[0][1] * streams)
    half, whole = gpu.gdn_chunk_seconds
    size = heads.key_size * heads.value_size / 128**2
    walk = min(half * math.ceil(2 * streams / gpu.multiprocessors), whole * math.ceil(streams / gpu.multiprocessors))
    pieces = int(gpu.multiprocessors // max(2 * streams, 1))
    passes = 2 * half / pieces + _PIECE_SECONDS * pieces / max(chunks, 1) if pieces > 1 and outputs else walk
    prepared = gpu.gdn_prepare_seconds * streams * tokens if outputs else 0.0
    return size * chunks * min(walk, passes) + prepared


def backward_seconds(
    tokens: float, rows: float, heads: Heads, gpu: Hardware = HOPPER, *, passes: bool = False
) -> float:
    """Time of the rule's gradients over `rows` sequences of `tokens` tokens, what they compute again included; where gradients of
    states pass between such sequences, with what the outputs of each give to its first state."""
    again = 1 + _ENTERING if passes else 1.0
    if gpu.gdn_backward is not None:
        of_chunk, of_token = gpu.gdn_backward
        size = heads.key_size * heads.value_size / 128**2
        return again * size * max(math.ceil(tokens / CHUNK) * of_chunk, rows * tokens * heads.value_heads * of_token)
    fixed, each = gpu.gdn_loops[1]
    return again * math.ceil(tokens / CHUNK) * (fixed + each * rows * heads.value_heads)


# XLA's float32 step from one piece of a sequence to the next.
_PIECE_SECONDS = 1.0e-5
# Of the backward, its recurrence of gradients alone (docs/kernels/gdn.md).
_ENTERING = 0.3


def _batch_cost(shape: GDNShape, ranks: int, gpu: Hardware) -> Cost:
    rows = math.ceil(shape.batch / ranks)
    features_in, features_out = _moved_features(shape)
    received = rows * shape.length * (features_in + features_out) * shape.itemsize * (ranks - 1) / ranks
    flops, kernel = _rule(shape, rows, shape.length, shape.heads, gpu)
    padding = (rows - shape.batch / ranks) * shape.length
    # Projections, and an MLP of three times the width (Qwen3.5's), of the layers that run on padding too.
    layer = shape.width * (shape.heads.features + 2 * shape.heads.parts[2]) + 9 * shape.width**2
    return Cost(received, flops, 2 if ranks > 1 else 0, None, kernel, 2 * padding * layer * shape.layers)


def _rule(shape: GDNShape, rows: float, tokens: float, heads: Heads, gpu: Hardware) -> tuple[float, float]:
    """FLOPs of the rule over rows of so many tokens, and seconds in the kernel; of all layers."""
    return shape.layers * rule_flops(rows * tokens, heads), shape.layers * kernel_seconds(tokens, rows, heads, gpu=gpu)


def _moved_features(shape: GDNShape) -> tuple[float, float]:
    """Features of a token into and out of a run: the layer's width, or the operation's operands and output."""
    if shape.width:
        return shape.width, shape.width
    decay_and_beta = shape.heads.value_heads * 2 * 4 / shape.itemsize  # float32
    return shape.heads.features + decay_and_beta, shape.heads.parts[2]


def _head_cost(shape: GDNShape, ranks: int, gpu: Hardware) -> Cost:
    heads, others = shape.heads, (ranks - 1) / ranks
    indivisible = [n for n in (heads.key_heads, heads.value_heads) if n % ranks]
    obstacle = f"{indivisible[0]} heads do not divide over {ranks} ranks" if indivisible else None
    if shape.width:
        split = (heads.features + 2 * heads.value_heads) / ranks
        features_in = shape.width if gathers_input(heads, shape.width, ranks) else split
    else:
        features_in = _moved_features(shape)[0] / ranks
    features = features_in + heads.parts[2] / ranks
    tokens = shape.batch * shape.length
    received = shape.layers * tokens * features * shape.itemsize * others
    flops = shape.layers * rule_flops(tokens, heads) / ranks
    kernel = 0.0 if obstacle else _rule(shape, shape.batch, shape.length, heads.share(ranks), gpu)[1]
    return Cost(received, flops, 2 * shape.layers if ranks > 1 else 0, obstacle, kernel)


def _state_cost(shape: GDNShape, ranks: int, layout: Layout, gpu: Hardware) -> Cost:
    heads = shape.heads
    tokens = shape.batch * shape.length / ranks
    if ranks == 1:
        flops, kernel = _rule(shape, shape.batch, shape.length, heads, gpu)
        return Cost(0.0, flops, 0, None, kernel)
    zigzag = layout != Contiguous()
    two = type(layout) is Zigzag and (layout.block is None or layout.block == shape.length // (2 * ranks))
    otherwise = f"layout {layout} cuts the sequence otherwise than Contiguous() or the two-chunk Zigzag()"
    obstacle = None if two or not zigzag else otherwise
    folds = 2 if zigzag else 1
    update = shape.batch * heads.value_heads * heads.key_size * heads.value_size * 4
    pair = update + shape.batch * heads.value_heads * heads.key_size**2 * 4
    if ranks <= GATHER_RANKS:
        passed, collectives = (ranks - 1) * folds * pair, 1
    else:
        steps = math.ceil(math.log2(ranks))
        # The last step needs no transitions, and one more permute hands the result to the next chunk.
        passed, collectives = folds * ((steps - 1) * pair + 2 * update), folds * (steps + 1)
    hops = math.ceil((shape.conv_width - 1) / max(shape.length // (folds * ranks), 1))
    halo = folds * shape.batch * (shape.conv_width - 1) * heads.features * shape.itemsize
    received = shape.layers * (passed + halo + update)
    twice = rule_flops(tokens, heads) + rule_flops(tokens, heads, extra=heads.key_size, outputs=False)
    chunk, rows = shape.length / (ranks * folds), shape.batch * folds
    kernel = sum(kernel_seconds(chunk, rows, heads, outputs=outputs, gpu=gpu) for outputs in (True, False))
    count = shape.layers * (collectives + folds * hops)
    return Cost(received, shape.layers * twice, count, obstacle, shape.layers * kernel)
