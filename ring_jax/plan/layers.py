"""One layer of a forward pass on one rank: its pieces, from the table of hardware facts."""

import dataclasses
from typing import Any

from ring_jax.context import cost as attention_cost
from ring_jax.gdn.cost import GDNShape, Rates, backward_seconds, costs, kernel_seconds
from ring_jax.models.qwen3_5 import Config
from ring_jax.models.qwen3_5.config import FULL
from ring_jax.moe.exchange import seconds_per_byte
from ring_jax.plan.machine import Machine
from ring_jax.plan.result import Piece
from ring_jax.plan.sizes import Weights

PRODUCTS, ATTENTION, RULE, ELEMENTWISE = "matrix products", "attention", "gated delta rule", "element-wise kernels"
EXPERTS, WEIGHTS, COPIES = "experts", "weights gathered", "weights copied by the scan"
GRADIENTS, OPTIMIZER, OVERHEAD, HEAD = "gradients summed", "optimizer", "small kernels", "head and loss"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a pass runs on and how: the arguments of `predict`, all resolved.

    Fields:
        config, machine, weights: model, mesh, and its parameters on a rank.
        rows: of the batch on one rank. tokens: of one row, over all ranks.
        strategy, gdn_strategy, expert_strategy: how attention, the gated delta rule and tokens for experts go over ranks.
        expert: the axis of the experts. weight_axes: axes over which weights lie besides.
    """

    config: Config
    machine: Machine
    weights: Weights
    rows: int
    tokens: int
    strategy: str
    gdn_strategy: str
    expert_strategy: str
    expert: str | None
    weight_axes: tuple[str, ...]

    @property
    def local(self) -> float:
        """Tokens on one rank."""
        return self.rows * self.tokens / self.machine.size("context")

    @property
    def tensor(self) -> int:
        return self.machine.size("tensor")


def layer(at: Setting, index: int) -> list[Piece]:
    """Forward, layer `index` of a group."""
    full = at.config.layer_types[index] == FULL
    pieces = gathered_weights(at, index)
    pieces += [copied_weights(at, index), products(at, at.weights.layers[index], at.local), elementwise(at, full)]
    pieces += [attention(at)] if full else rule(at)
    pieces += experts(at, index) if at.config.experts is not None else []
    return pieces + tensor_sums(at, 2)


def products(at: Setting, parameters: float, rows: float, term: str = PRODUCTS) -> Piece:
    """Dense products of so many rows: bound by arithmetic, or by reading weights."""
    gpu = at.machine.gpu
    read = 2 * parameters / (gpu.memory_bytes_per_s * gpu.weight_share)
    return Piece(term, max(2 * parameters * rows / gpu.product_flops, read))


def copied_weights(at: Setting, index: int) -> Piece:
    """A scan over stacked weights copies each before its product reads it (docs/measurements/model.md)."""
    held = at.weights.layers[index] + at.weights.routed[index]
    return Piece(COPIES, 2 * 2 * held / stream(at))


def gathered_weights(at: Setting, index: int) -> list[Piece]:
    """Weights that lie over an axis besides come layer by layer, in the open."""
    missing = 2 * (at.weights.layers[index] + at.weights.routed[index] - at.weights.layer_held[index])
    if not at.weight_axes or missing <= 0:
        return []
    link = at.machine.link(*at.weight_axes)
    seconds = at.machine.wait(missing, 4, link)
    return [Piece(WEIGHTS, 0.0, seconds, seconds, missing, link)]


def stream(at: Setting) -> float:
    """Bytes a second of kernels that only read and write."""
    return at.machine.gpu.memory_bytes_per_s * at.machine.gpu.stream_share


def elementwise(at: Setting, full: bool) -> Piece:
    """Norms, rotary embedding, gates and the convolution: bytes read and written, bfloat16. Products add to the residual stream, and
    that of a dense layer makes SwiGLU; what experts give is summed in a pass."""
    config, tensor = at.config, at.tensor
    token = (8.0 if config.experts is None else 16.0) * config.hidden_size
    if full:
        query, key = (n * config.head_dim / tensor for n in (config.num_heads, config.num_kv_heads))
        # Queries: norm with rotation 4, gate 6; keys and values: norm of the former 4, packed 8, kept 8.
        token += 10 * query + 20 * key
    else:
        token += (4 * config.linear.features + 6 * config.linear.parts[2]) / tensor
    return Piece(ELEMENTWISE, at.local * token / stream(at))


def swiglu_backward(at: Setting) -> Piece:
    """Of a dense layer: gate and up are written once more, and read with the gradient for theirs."""
    return Piece(ELEMENTWISE, at.local * 14.0 * (at.config.mlp_size or 0) / at.tensor / stream(at))


def attention_shape(at: Setting) -> dict[str, Any]:
    """Arguments of `context.cost.costs`."""
    config = at.config
    return {
        "query_len": at.tokens,
        "key_len": at.tokens,
        "ranks": at.machine.size("context"),
        "query_heads": config.num_heads // at.tensor,
        "kv_heads": config.num_kv_heads // at.tensor,
        "head_size": config.head_dim,
        "gpu": at.machine.gpu,
        "bytes_per_second": at.machine.rate(at.machine.link("context")),
    }


def attention(at: Setting, work: float = 1.0, moved: float = 1.0) -> Piece:
    """Over the context axis; with more work and more bytes for the backward."""
    link = at.machine.link("context")
    shape = attention_shape(at)
    found = attention_cost.costs(**shape, rows=at.rows, work=work, moved=moved)[at.strategy]
    travels = at.machine.size("context") > 1
    return Piece(ATTENTION, found.compute, found.transfer, found.exposed, found.bytes, link if travels else None)


def rule_shape(at: Setting) -> GDNShape:
    run = max(sum(kind != FULL for kind in at.config.layer_types[: at.config.period]), 1)
    heads = at.config.linear.share(at.tensor)
    return GDNShape(at.rows, at.tokens, heads, at.config.hidden_size, at.config.conv_width, run)


def rule(at: Setting) -> list[Piece]:
    """One layer of a run of GDN layers."""
    shape, ranks = rule_shape(at), at.machine.size("context")
    if ranks == 1:
        return [Piece(RULE, kernel_seconds(at.tokens, at.rows, shape.heads, gpu=at.machine.gpu))]
    link = at.machine.link("context")
    rates = Rates(bytes_per_second=at.machine.rate(link))
    found = costs(shape, ranks, "zigzag", at.machine.gpu)[at.gdn_strategy]
    moving = (found.seconds(rates) - found.kernel_seconds - found.beside / at.machine.gpu.product_flops) / shape.layers
    beside = found.beside / at.machine.gpu.product_flops / shape.layers
    pieces = [Piece(RULE, found.kernel_seconds / shape.layers, moving, moving, found.bytes / shape.layers, link)]
    return pieces + ([Piece(PRODUCTS, beside)] if beside else [])


def rule_backward(at: Setting) -> Piece:
    """Gradients of the rule: on one rank's tokens, states and their gradients passing as in the forward, twice."""
    shape, ranks, gpu = rule_shape(at), at.machine.size("context"), at.machine.gpu
    folds = 2 if ranks > 1 and at.gdn_strategy == "state" else 1
    rows, heads, share = float(at.rows), shape.heads, ranks * folds
    if at.gdn_strategy == "head" and ranks > 1:
        heads, share = heads.share(ranks), 1
    elif at.gdn_strategy == "batch" and ranks > 1:
        rows, share = -(-at.rows // ranks), 1
    seconds = backward_seconds(at.tokens / share, rows * folds, heads, gpu, passes=folds == 2)
    moved = rule(at)[0].times(0.0, 2.0)
    return dataclasses.replace(moved, compute=seconds)


def experts(at: Setting, index: int, rows: float | None = None) -> list[Piece]:
    """Routed experts on the rows that reach this rank's share of them."""
    config, gpu = at.config.experts, at.machine.gpu
    assert config is not None
    rows = at.local if rows is None else rows
    assigned = rows * config.per_token  # even routing: as many come as go
    each = at.weights.routed[index] * at.machine.size(at.expert) / config.count
    held = config.count / at.machine.size(at.expert)
    met = held * (1 - (1 - config.per_token / config.count) ** (rows * at.machine.size(at.expert)))
    read = 2 * each * met / (gpu.memory_bytes_per_s * gpu.weight_share)
    summed = 2.0 * assigned * at.config.hidden_size / stream(at)
    pieces = [
        Piece(EXPERTS, max(2 * each * assigned / gpu.expert_flops[0], read) + summed + gpu.seconds_per_collective)
    ]
    if at.expert is not None and at.machine.size(at.expert) > 1:
        pieces.append(_exchange(at, rows))
    return pieces


def _exchange(at: Setting, rows: float) -> Piece:
    """Rows in bfloat16 there, float32 sums back; nothing of it hidden."""
    config, ranks = at.config.experts, at.machine.size(at.expert)
    assert config is not None and at.expert is not None
    link = at.machine.link(at.expert)
    slower = at.machine.gpu.gather_bytes_per_s / at.machine.rate(link)
    per_byte = seconds_per_byte(ranks, config.per_token, at.machine.gpu)[at.expert_strategy]
    token = rows * at.config.hidden_size * (2.0 + 4.0)
    met = 1 - (1 - 1 / ranks) ** config.per_token if at.expert_strategy == "ragged" else 1.0
    seconds = token * per_byte * slower + 2 * at.machine.gpu.seconds_per_collective
    return Piece(EXPERTS, 0.0, seconds, seconds, token * (ranks - 1) * met, link)


def tensor_sums(at: Setting, count: int, itemsize: int = 2) -> list[Piece]:
    """Sums over the tensor axis of a layer's two output products, in the open."""
    if at.tensor == 1:
        return []
    link = at.machine.link("tensor")
    received = count * 2 * (at.tensor - 1) / at.tensor * at.local * at.config.hidden_size * itemsize
    seconds = at.machine.wait(received, count, link)
    return [Piece(PRODUCTS, 0.0, seconds, seconds, received, link)]
