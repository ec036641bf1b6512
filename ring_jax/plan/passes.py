"""Prefill, a training step and a decode step, made of the pieces of their layers."""

import dataclasses

from ring_jax.gdn.cost import rule_flops
from ring_jax.models.qwen3_5 import Config
from ring_jax.models.qwen3_5.config import FULL, LINEAR
from ring_jax.plan.layers import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    EXPERTS,
    GRADIENTS,
    HEAD,
    OPTIMIZER,
    OVERHEAD,
    PRODUCTS,
    RULE,
    WEIGHTS,
    Setting,
    attention,
    experts,
    layer,
    products,
    rule_backward,
    stream,
    swiglu_backward,
)
from ring_jax.plan.result import Pass, Piece


def prefill(at: Setting) -> Pass:
    """Logits of the last tokens, keys and states kept."""
    config = at.config
    group = [piece for index in range(config.period) for piece in layer(at, index)]
    after = [products(at, at.weights.head, at.rows, HEAD)]
    tokens = at.rows * at.tokens * at.machine.size("data")
    flops = model_flops(config, at.tokens) * at.rows / (at.machine.size("context") * at.tensor)
    return Pass("prefill", (), tuple(group), config.groups, tuple(after), tokens, flops, at.machine.gpu.peak_flops)


# How often each piece of a forward pass runs in a step with rematerialisation of all but attention: computed, moved.
_REPEATED = {
    PRODUCTS: (4.0, 4.0),  # forward, again, and two products for each in the backward
    ELEMENTWISE: (4.0, 4.0),
    COPIES: (3.0, 0.0),
    WEIGHTS: (0.0, 4.0),  # gathered three times, gradients scattered once
    EXPERTS: (4.6, 4.0),
}


def training(at: Setting, optimizer_bytes: float) -> Pass:
    """Loss, gradients and an update; attention's results are saved, everything else is computed again."""
    config, machine, gpu = at.config, at.machine, at.machine.gpu
    group = []
    for index in range(config.period):
        for piece in layer(at, index):
            if piece.term == ATTENTION:
                group += [piece, _attention_backward(at)]
            elif piece.term == RULE:
                group += [piece.times(2.0), rule_backward(at)]
            else:
                group.append(piece.times(*_REPEATED[piece.term]))
        group.append(swiglu_backward(at))
    # Logits in float32: written, read for the maximum, the sum and the gradient, which is written and read twice in bfloat16.
    logits = at.local * at.weights.head / config.hidden_size
    head = [products(at, at.weights.head, at.local, HEAD).times(4.0), Piece(HEAD, logits * 22.0 / stream(at))]
    update = Piece(OPTIMIZER, at.weights.held * (2 * optimizer_bytes + 8.0) / stream(at))
    after = [*head, *_summed_gradients(at), update]
    tokens = at.rows * at.tokens * machine.size("data")
    flops = 3 * model_flops(config, at.tokens, head=True) * at.rows / (machine.size("context") * at.tensor)
    return Pass("train", (), tuple(group), config.groups, tuple(after), tokens, flops, gpu.peak_flops)


def _attention_backward(at: Setting) -> Piece:
    """What forward + backward takes beyond a forward: 2.5 times its FLOPs; KV travels again, and its float32 gradients."""
    gpu, head = at.machine.gpu, at.config.head_dim
    both = 3.5 * gpu.attention_rate(head) / gpu.attention_rate(head, backward=True)
    found = attention(at, both - 1.0, 3.0)
    more = at.machine.size("context") * (gpu.hop_seconds[1] - 2 * gpu.hop_seconds[0]) if found.link else 0.0
    return dataclasses.replace(found, compute=found.compute + more, bytes=3 * found.bytes)


def _summed_gradients(at: Setting) -> list[Piece]:
    """Of weights that lie whole on ranks with other tokens, in the open after the last layer."""
    pieces = []
    for axis in ("context", "data"):
        ranks = at.machine.size(axis)
        if ranks == 1 or axis in at.weight_axes:
            continue
        link = at.machine.link(axis)
        received = 2 * 2 * at.weights.held * (ranks - 1) / ranks
        seconds = at.machine.wait(received, 2, link)
        pieces.append(Piece(GRADIENTS, 0.0, seconds, seconds, received, link))
    return pieces


def decode(at: Setting) -> Pass:
    """One token for every row, after `tokens` of them."""
    config, machine, gpu = at.config, at.machine, at.machine.gpu
    context = machine.size("context")
    # Where weights lie over axes besides, each rank multiplies its part and results are summed.
    spread = machine.size(*at.weight_axes) if at.weight_axes else 1
    group: list[Piece] = []
    for index in range(config.period):
        full = config.layer_types[index] == FULL
        group.append(products(at, at.weights.layers[index] / spread, at.rows))
        keys = 2 * 2 * at.rows * at.tokens / context * config.num_kv_heads * config.head_dim / at.tensor
        state = 8 * at.rows * config.linear.value_heads * config.linear.key_size * config.linear.value_size / at.tensor
        group.append(Piece(ATTENTION, keys / stream(at)) if full else Piece(RULE, state / stream(at)))
        if config.experts is not None:
            group += [dataclasses.replace(piece, exposed=0.0) for piece in experts(at, index, at.rows)[:1]]
        group.append(Piece(OVERHEAD, gpu.seconds_per_layer))
        sums = (4 if spread > 1 else 0) + (2 if full and context > 1 else 0) + (2 if at.tensor > 1 else 0)
        sums += 1 if config.experts is not None and machine.size(at.expert) > 1 else 0
        if sums:
            axes = [a for a in ("context", "tensor", *at.weight_axes) if machine.size(a) > 1]
            link = machine.link(*axes)
            received = sums * at.rows * config.hidden_size * 4.0
            wait = machine.wait(received, sums, link)
            group.append(Piece(OVERHEAD, 0.0, wait, wait, received, link))
    after = [products(at, at.weights.head / spread, at.rows, HEAD)]
    batch = at.rows * machine.size("data")
    used = 2 * (_used(config) + config.vocab_size * config.hidden_size) * at.rows / (at.tensor * spread)
    return Pass("decode", (), tuple(group), config.groups, tuple(after), batch, used, gpu.peak_flops)


def _used(config: Config) -> float:
    """Parameters in layers that one token meets."""
    width, linear = config.hidden_size, config.linear
    query = config.num_heads * config.head_dim
    full = width * (2 * query + 2 * config.num_kv_heads * config.head_dim) + query * width
    gdn = width * (linear.features + linear.parts[2] + 2 * linear.value_heads) + linear.parts[2] * width
    if config.experts is None:
        mlp = 3.0 * width * (config.mlp_size or 0)
    else:
        mlp = 3.0 * width * (config.experts.per_token * config.experts.size + config.experts.shared_size)
        mlp += width * config.experts.count
    counts = {kind: config.layer_types.count(kind) for kind in (FULL, LINEAR)}
    return counts[FULL] * full + counts[LINEAR] * gdn + config.num_layers * mlp


def model_flops(config: Config, length: int, *, head: bool = False) -> float:
    """FLOPs of a forward pass over one sequence: products, causal attention, the gated delta rule."""
    counts = {kind: config.layer_types.count(kind) for kind in (FULL, LINEAR)}
    used = _used(config) + (config.vocab_size * config.hidden_size if head else 0)
    pairs = counts[FULL] * 2.0 * length**2 * config.num_heads * config.head_dim
    return 2 * used * length + pairs + counts[LINEAR] * rule_flops(length, config.linear)
