"""What each way to spread the gated delta rule over ranks moves and multiplies, and which one `auto` takes.

Bytes are those that one rank receives, FLOPs those that one rank executes (2 for each multiply-add), for one forward
pass of a run of layers: the mixers only, without projections (`batch` also gives every rank whole rows of whatever
else runs between its two all-to-alls, at no extra cost unless rows are padded).
"""

import math
from dataclasses import dataclass

from ring_jax._checks import check_count, check_instance, check_number
from ring_jax._hardware import HOPPER
from ring_jax.gdn.chunked import CHUNK
from ring_jax.gdn.heads import Heads
from ring_jax.gdn.state_scan import GATHER_RANKS
from ring_jax.layout import Contiguous, Layout, Zigzag, as_layout

WAYS = ("batch", "head", "state")  # to spread a sequence over ranks, see `ring_jax.gdn.partition`


@dataclass(frozen=True)
class Rates:
    """Nominal rates that weigh bytes against FLOPs: an H200's float32 (not TF32) products, and NCCL over NVLink.

    Between hosts, or with a kernel on tensor cores, give your own: both favour `state`.
    """

    flops_per_second: float = HOPPER.float32_flops
    bytes_per_second: float = HOPPER.gather_bytes_per_s
    seconds_per_collective: float = HOPPER.seconds_per_collective

    def __post_init__(self):
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

    def __post_init__(self):
        check_instance("GDNShape(heads=...)", self.heads, Heads, "ring_jax.gdn.Heads")
        least = {"batch": 0, "length": 0, "width": 0, "conv_width": 1, "layers": 1, "itemsize": 1}
        for name, low in least.items():
            check_count(f"GDNShape({name}=...)", getattr(self, name), low)


@dataclass(frozen=True)
class Cost:
    """Of one way, for one rank and one forward pass. `obstacle` says why it cannot run here, None if it can."""

    bytes: float
    flops: float
    collectives: int
    obstacle: str | None = None

    def seconds(self, rates: Rates = Rates()) -> float:  # noqa: B008 (a frozen value)
        """Rough time at nominal rates, nothing overlapped."""
        check_instance("rates", rates, Rates, "ring_jax.gdn.cost.Rates")
        moving = self.bytes / rates.bytes_per_second + self.collectives * rates.seconds_per_collective
        return moving + self.flops / rates.flops_per_second


def costs(shape: GDNShape, ranks: int, layout: Layout | str = "contiguous") -> dict[str, Cost]:
    """What each way moves and multiplies for a shape on `ranks` context ranks.

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
    layout = as_layout(layout)
    return {
        "batch": _batch_cost(shape, ranks),
        "head": _head_cost(shape, ranks),
        "state": _state_cost(shape, ranks, layout),
    }


def choose_way(
    shape: GDNShape,
    ranks: int,
    layout: Layout | str = "contiguous",
    rates: Rates = Rates(),  # noqa: B008
) -> tuple[str, str]:
    """The way that `auto` takes, and why: the least `Cost.seconds` among those that can run.

    In words: `batch` where rows divide over the ranks; else `head` where heads divide and links are fast (it multiplies
    nothing twice); else `state` (twice the FLOPs of the rule, next to no bytes); a layout too fine for `state` leaves
    `batch`, rows padded.

    Example:
        >>> heads = Heads(16, 32, 128, 128)
        >>> one_row = GDNShape(batch=1, length=1 << 20, heads=heads, width=2048, layers=3)
        >>> choose_way(one_row, 8)[0], choose_way(one_row, 32)[0], choose_way(one_row, 8, rates=BETWEEN_HOSTS)[0]
        ('head', 'state', 'state')
        >>> choose_way(GDNShape(batch=64, length=8192, heads=heads, width=2048, layers=3), 4)[0]
        'batch'
    """
    found = costs(shape, ranks, layout)
    able = {way: cost for way, cost in found.items() if cost.obstacle is None}
    way = min(able, key=lambda name: able[name].seconds(rates))
    words = []
    for name, cost in found.items():
        figures = (
            f"{cost.bytes / 2**20:.4g} MiB, {cost.flops / 1e9:.4g} GFLOP, about {cost.seconds(rates) * 1e3:.3g} ms"
        )
        words.append(f"{name}: {cost.obstacle or figures}")
    return way, "; ".join(words)


def gathers_input(heads: Heads, width: int, ranks: int) -> bool:
    """Whether `head` moves fewer bytes by gathering the layer input (width D) than by splitting its projections.

    Per token of the sequence a rank receives D elements of input, or 1/C of the projections' features.
    """
    return width * ranks <= heads.features + 2 * heads.value_heads


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


def _batch_cost(shape: GDNShape, ranks: int) -> Cost:
    rows = math.ceil(shape.batch / ranks)
    features_in, features_out = _moved_features(shape)
    received = rows * shape.length * (features_in + features_out) * shape.itemsize * (ranks - 1) / ranks
    return Cost(received, shape.layers * rule_flops(rows * shape.length, shape.heads), 2 if ranks > 1 else 0)


def _moved_features(shape: GDNShape) -> tuple[float, float]:
    """Features of a token into and out of a run: the layer's width, or the operation's operands and output."""
    if shape.width:
        return shape.width, shape.width
    decay_and_beta = shape.heads.value_heads * 2 * 4 / shape.itemsize  # float32
    return shape.heads.features + decay_and_beta, shape.heads.parts[2]


def _head_cost(shape: GDNShape, ranks: int) -> Cost:
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
    return Cost(received, flops, 2 * shape.layers if ranks > 1 else 0, obstacle)


def _state_cost(shape: GDNShape, ranks: int, layout: Layout) -> Cost:
    heads = shape.heads
    tokens = shape.batch * shape.length / ranks
    if ranks == 1:
        return Cost(0.0, shape.layers * rule_flops(tokens, heads), 0)
    zigzag = layout != Contiguous()
    served = not zigzag or layout == Zigzag() or getattr(layout, "block", None) == shape.length // (2 * ranks) > 0
    served = served and (not zigzag or isinstance(layout, Zigzag))
    obstacle = None if served else f"layout {layout} cuts the sequence into more than one or two chunks a rank"
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
    return Cost(received, shape.layers * twice, shape.layers * (collectives + folds * hops), obstacle)
