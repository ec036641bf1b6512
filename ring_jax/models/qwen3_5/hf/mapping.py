"""Which tensor of a Hugging Face checkpoint is which part of which parameter, read in either direction.

A `Rule` is one line of the table: a tensor's name, its axes, and the parameters that lie along them. Axes are names of
sizes (`_sizes`), so the table also says every shape. Written out for a config it becomes `Piece`s: boxes of tensors
that are, transposed, boxes of parameters. Loading reads the pieces that meet a device's shard; saving fills a tensor
from its pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ring_jax.models.qwen3_5.config import FULL, Config

Path = tuple[str | int, ...]
Box = tuple[tuple[int, int], ...]  # (start, stop) of every dimension

# The published multimodal checkpoints hold the text model under another prefix, beside what it does not need.
SKIPPED = re.compile(r"(model\.)?visual\.|mtp\.")
_PREFIX = re.compile(r"model\.language_model\.")
# These stay float32 whatever the dtype of the model.
FLOAT32 = ("A_log", "norm")
# Positions along an axis of two: gate and up projection of an MLP are one parameter.
_FIXED = {"gate": 0, "up": 1}
# Projections of one input are one parameter, whose columns go head by head: what a head of each kind holds, in order, and
# the tensors' dimension that the heads share equally. Columns of zeros may follow (`_columns`).
_HEADS = {
    "nk": {"q": "QK", "k": "QK", "v": "Z", "z": "Z", "b": "nv", "a": "nv"},
    "nkv": {"qg": "QG", "k": "KV", "v": "KV"},
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor.

    Fields:
        tensor: its name after "model.layers.{n}." ("{e}" is an expert).
        axes: its dimensions. "a+b" is a concatenation: part 0 has the a, part 1 the b; "1" is of size one.
        parts: "parameter: dimensions" without the leading one of groups; "gate" and "up" are index 0 and 1 of two, "nk.q"
            is what of every head (`_HEADS`) this part is.
        interleaved: the concatenation is repeated for every head.
    """

    tensor: str
    axes: str
    parts: tuple[str, ...]
    interleaved: bool = False


def _rule(tensor: str, axes: str, *parts: str, interleaved: bool = False) -> Rule:
    return Rule(tensor, axes, parts, interleaved)


TOP = (
    _rule("model.embed_tokens.weight", "V D", "embed: V D"),
    _rule("model.norm.weight", "D", "final_norm: D"),
)
HEAD = (_rule("lm_head.weight", "V D", "lm_head: D V"),)
NORMS = (
    _rule("input_layernorm.weight", "D", "input_norm: D"),
    _rule("post_attention_layernorm.weight", "D", "post_norm: D"),
)
ATTENTION = (
    _rule("self_attn.q_proj.weight", "QG D", "mixer.in_proj: D nkv.qg"),
    _rule("self_attn.k_proj.weight", "KV D", "mixer.in_proj: D nkv.k"),
    _rule("self_attn.v_proj.weight", "KV D", "mixer.in_proj: D nkv.v"),
    _rule("self_attn.o_proj.weight", "D Q", "mixer.o: Q D"),
    _rule("self_attn.q_norm.weight", "H", "mixer.q_norm: H"),
    _rule("self_attn.k_norm.weight", "H", "mixer.k_norm: H"),
)
LINEAR = (
    _rule("linear_attn.conv1d.weight", "QK+QK+Z 1 W", "mixer.conv_q: W QK", "mixer.conv_k: W QK", "mixer.conv_v: W Z"),
    _rule("linear_attn.A_log", "nv", "mixer.A_log: nv"),
    _rule("linear_attn.dt_bias", "nv", "mixer.dt_bias: nv"),
    _rule("linear_attn.norm.weight", "dv", "mixer.norm: dv"),
    _rule("linear_attn.out_proj.weight", "D Z", "mixer.o: Z D"),
)
_QKV = tuple(f"mixer.in_proj: D nk.{part}" for part in "qkv")
SEPARATE = (
    _rule("linear_attn.in_proj_qkv.weight", "QK+QK+Z D", *_QKV),
    _rule("linear_attn.in_proj_z.weight", "Z D", "mixer.in_proj: D nk.z"),
    _rule("linear_attn.in_proj_b.weight", "nv D", "mixer.in_proj: D nk.b"),
    _rule("linear_attn.in_proj_a.weight", "nv D", "mixer.in_proj: D nk.a"),
)
FUSED = (
    _rule("linear_attn.in_proj_qkvz.weight", "QK+QK+Z+Z D", *_QKV, "mixer.in_proj: D nk.z", interleaved=True),
    _rule(
        "linear_attn.in_proj_ba.weight", "nv+nv D", "mixer.in_proj: D nk.b", "mixer.in_proj: D nk.a", interleaved=True
    ),
)
DENSE = (
    _rule("mlp.gate_proj.weight", "F D", "mlp.gate_up: D gate F"),
    _rule("mlp.up_proj.weight", "F D", "mlp.gate_up: D up F"),
    _rule("mlp.down_proj.weight", "D F", "mlp.down: F D"),
)
ROUTED = (
    _rule("mlp.gate.weight", "E D", "mlp.router: D E"),
    _rule("mlp.shared_expert.gate_proj.weight", "Fs D", "mlp.shared_gate_up: D gate Fs"),
    _rule("mlp.shared_expert.up_proj.weight", "Fs D", "mlp.shared_gate_up: D up Fs"),
    _rule("mlp.shared_expert.down_proj.weight", "D Fs", "mlp.shared_down: Fs D"),
    _rule("mlp.shared_expert_gate.weight", "1 D", "mlp.shared_gate: D"),
)
STACKED = (
    _rule("mlp.experts.gate_up_proj", "E F+F D", "mlp.gate_up: E D gate F", "mlp.gate_up: E D up F"),
    _rule("mlp.experts.down_proj", "E D F", "mlp.down: E F D"),
)
SINGLE = (
    _rule("mlp.experts.{e}.gate_proj.weight", "F D", "mlp.gate_up: E D gate F"),
    _rule("mlp.experts.{e}.up_proj.weight", "F D", "mlp.gate_up: E D up F"),
    _rule("mlp.experts.{e}.down_proj.weight", "D F", "mlp.down: E F D"),
)


def _sizes(config: Config) -> dict[str, int]:
    heads, experts = config.linear, config.experts
    sizes = {
        "1": 1,
        "gate": 2,
        "up": 2,
        "V": config.vocab_size,
        "D": config.hidden_size,
        "QG": config.num_heads * 2 * config.head_dim,  # query and gate of every head
        "Q": config.num_heads * config.head_dim,
        "KV": config.num_kv_heads * config.head_dim,
        "H": config.head_dim,
        "QK": heads.key_heads * heads.key_size,
        "Z": heads.value_heads * heads.value_size,
        "nk": heads.key_heads,
        "nk columns": heads.stride,
        "nv": heads.value_heads,
        "nkv": config.num_kv_heads,
        "dv": heads.value_size,
        "W": config.conv_width,
    }
    if experts is None:
        return sizes | {"F": config.mlp_size or 0}
    return sizes | {"E": experts.count, "F": experts.size, "Fs": experts.shared_size}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of a tensor that is, transposed, a box of a parameter.

    Fields:
        tensor, param: canonical name and path in the parameter tree.
        source, target: the box in the tensor and in the parameter.
        axes: for every dimension of the parameter, that of the tensor, or None (one index of the parameter).
    """

    tensor: str
    param: Path
    source: Box
    target: Box
    axes: tuple[int | None, ...]

    @property
    def group(self) -> int | None:
        """The group of layers that this piece belongs to; None outside of them."""
        return self.target[0][0] if self.param[0] == "groups" else None

    def meet(self, box: Box) -> Piece | None:
        """The part of this piece inside `box` of the parameter; None where they do not meet."""
        target = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.target, box, strict=True))
        if any(start >= stop for start, stop in target):
            return None
        source = list(self.source)
        for axis, (start, stop), (origin, _) in zip(self.axes, target, self.target, strict=True):
            if axis is not None:
                shift = self.source[axis][0] - origin
                source[axis] = (start + shift, stop + shift)
        return dataclasses.replace(self, source=tuple(source), target=target)

    def split(self, elements: int) -> Iterator[Piece]:
        """This piece cut along the tensor's first dimension that varies, into pieces of about `elements` or one row."""
        varying = [d for d, axis in enumerate(self.axes) if axis is not None]
        first = min(varying, key=lambda d: self.axes[d])  # type: ignore[arg-type, return-value]
        start, stop = self.target[first]
        rows = max(1, elements * (stop - start) // math.prod(extents(self.target)))
        for begin in range(start, stop, rows):
            box = list(self.target)
            box[first] = (begin, min(begin + rows, stop))
            part = self.meet(tuple(box))
            assert part is not None
            yield part

    def as_param(self, block: np.ndarray) -> np.ndarray:
        """A view of `block`, the source box of the tensor, in the order of the target box."""
        order = [axis for axis in self.axes if axis is not None]
        rest = [axis for axis in range(block.ndim) if axis not in order]
        view = block.transpose(rest + order)[(0,) * len(rest)]
        return np.expand_dims(view, tuple(d for d, axis in enumerate(self.axes) if axis is None))


def at(tree: Any, path: Path, what: str) -> Any:
    """The leaf of nested dicts (or lists) at `path`; `what` names the tree in the error."""
    for depth, key in enumerate(path):
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            lacking = ".".join(map(str, path[: depth + 1]))
            raise ValueError(f"{what} lack {lacking}, which a model of this config has") from None
    return tree


def extents(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in box)


@dataclasses.dataclass
class Plan:
    """The table for one model: shapes of all tensors (canonical names) and parameters, and the pieces that join them.

    `pieces` follow the order of layers; `float32` are the parameters that keep that dtype.
    """

    tensors: dict[str, tuple[int, ...]]
    params: dict[Path, tuple[int, ...]]
    pieces: list[Piece]

    @staticmethod
    def float32(path: Path) -> bool:
        return "mixer" in path and path[-1] in FLOAT32


def canonical(name: str) -> str | None:
    """The name of a tensor in a text-only checkpoint; None for tensors of the vision and MTP parts."""
    return None if SKIPPED.match(name) else _PREFIX.sub("model.", name, count=1)


def plan(config: Config, present: Iterable[str] = ()) -> Plan:
    """Tensors, parameters and pieces of a model.

    Args:
        config: sizes of the model.
        present: canonical names in the checkpoint to read. They decide between the spellings of the families (experts
            stacked or one by one, projections fused or not); without them the config's own family does.
    """
    suffixes = {re.sub(r"experts\.\d+\.", "experts.{e}.", name.split(".", 3)[-1]) for name in present}

    def spelling(*alternatives: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return max(alternatives, key=lambda rules: sum(rule.tensor in suffixes for rule in rules))

    fused_first = config.family == "qwen3_next"
    projections = spelling(FUSED, SEPARATE) if fused_first else spelling(SEPARATE, FUSED)
    experts = spelling(SINGLE, STACKED) if fused_first else spelling(STACKED, SINGLE)
    mlp = DENSE if config.experts is None else ROUTED + experts
    result = Plan({}, {}, [])
    add = functools.partial(_add, result, config, _sizes(config))
    for rule in TOP + (() if config.tie_embeddings else HEAD):
        add(rule, None)
    for layer in range(config.num_layers):
        mixer = ATTENTION if config.layer_types[layer] == FULL else LINEAR + projections
        for rule in NORMS + mixer + mlp:
            add(rule, layer)
    return result


def _add(result: Plan, config: Config, sizes: dict[str, int], rule: Rule, layer: int | None) -> None:
    """Adds the tensors of `rule` in one layer."""
    axes = [axis.split("+") for axis in rule.axes.split()]
    tensor_shape = tuple(sum(sizes[name] for name in names) for names in axes)
    by_expert = "{e}" in rule.tensor
    group, position = divmod(layer or 0, config.period)
    where: Path = () if layer is None else ("groups", "layers", position)
    for expert in range(sizes["E"] if by_expert else 1):
        name = rule.tensor.format(e=expert)
        name = name if layer is None else f"model.layers.{layer}.{name}"
        result.tensors[name] = tensor_shape
        for index, part in enumerate(rule.parts):
            key, _, dims = part.partition(": ")
            path: Path = (*where, *key.split("."))
            names: list[str | None] = list(dims.split())
            shape = tuple(_columns(dim, sizes) * sizes[dim.split(".")[0]] for dim in dims.split())
            box = [(0, size) for size in shape]
            fixed = {d: _FIXED[dim] for d, dim in enumerate(dims.split()) if dim in _FIXED}
            if by_expert:
                fixed[names.index("E")] = expert
            for d, place in fixed.items():
                names[d], box[d] = None, (place, place + 1)
            if layer is not None:
                shape, box, names = (config.groups, *shape), [(group, group + 1), *box], [None, *names]
            result.params[path] = shape
            for source, target, places in _boxes(axes, names, box, index, rule.interleaved, sizes):
                result.pieces.append(Piece(name, path, source, target, places))


def _held(dim: str, sizes: dict[str, int]) -> dict[str, int]:
    """What one head of a parameter's dimension "heads.part" holds, sizes in order; of any other, one entry."""
    heads, _, part = dim.partition(".")
    return {held: sizes[whole] // sizes[heads] for held, whole in _HEADS[heads].items()} if part else {dim: 1}


def _columns(dim: str, sizes: dict[str, int]) -> int:
    """Those of one head of a parameter's dimension: what it holds, and zeros behind where `sizes` gives it more."""
    return sizes.get(f"{dim.partition('.')[0]} columns", sum(_held(dim, sizes).values()))


def _boxes(
    axes: Any, names: Any, box: Any, index: int, interleaved: bool, sizes: Any
) -> Iterator[tuple[Box, Box, tuple[int | None, ...]]]:
    """Part `index` of a tensor as boxes (of the tensor, of the parameter, axes): one, or one for each head."""
    cut = next((d for d, name in enumerate(names) if name and "." in name), None)
    kind, part = ("", "") if cut is None else names[cut].split(".")
    heads = 1 if cut is None else sizes[kind]
    names = [_HEADS[kind][part] if d == cut else name for d, name in enumerate(names)]
    places = [None if name is None else _find(axes, name, index) for name in names]
    for head in range(heads):
        source, target = [(0, sum(sizes[name] for name in axis)) for axis in axes], list(box)
        if cut is not None:
            held = _held(dim := f"{kind}.{part}", sizes)
            start = head * _columns(dim, sizes) + sum(list(held.values())[: list(held).index(part)])
            target[cut] = (start, start + held[part])
        for d, axis in enumerate(places):
            if axis is None or (len(axes[axis]) == 1 and d != cut):
                continue
            total, size = source[axis][1], target[d][1] - target[d][0]
            before = sum(sizes[name] for name in axes[axis][: index if len(axes[axis]) > 1 else 0])
            start = head * (total // heads) + before // heads if interleaved else before + head * size
            source[axis] = (start, start + size)
        yield tuple(source), tuple(target), tuple(places)


def _find(axes: list[list[str]], dim: str, index: int) -> int:
    """The tensor's axis that is, or of which part `index` is, the parameter's dimension `dim`."""
    return next(a for a, names in enumerate(axes) if names[index if len(names) > 1 else 0] == dim)
