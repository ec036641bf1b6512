"""How long a model takes, what it holds and what it moves over a mesh of GPUs, before there is one.

`predict` adds up a prefill, a training step and a decode step from the package's one table of hardware facts
(`ring_jax._hardware`), whose rates the benches measure; `auto` chooses from the same cost models. ``ring-jax plan`` prints a plan,
``ring-jax plan --check`` compares it with this machine. What it leaves out, and how far it was off, is in docs/scale.md.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ring_jax._checks import check_choice, check_count, check_instance, check_number
from ring_jax._hardware import Hardware as Hardware
from ring_jax.context import cost
from ring_jax.context.strategies import choose_strategy
from ring_jax.gdn.cost import STRATEGIES as GDN_STRATEGIES
from ring_jax.gdn.cost import Rates
from ring_jax.gdn.cost import choose_strategy as choose_gdn
from ring_jax.models.qwen3_5 import Config
from ring_jax.moe.exchange import choose_strategy as choose_expert_strategy
from ring_jax.plan import memory, passes
from ring_jax.plan.layers import Setting, attention_shape, rule_shape
from ring_jax.plan.machine import NETWORK, Machine
from ring_jax.plan.result import Memory as Memory
from ring_jax.plan.result import Pass as Pass
from ring_jax.plan.result import Piece as Piece
from ring_jax.plan.result import Plan as Plan
from ring_jax.plan.sizes import weights_of

STRATEGIES = ("auto", *cost.NAMES)


def predict(
    model: "str | Path | Config",
    *,
    tokens: int,
    mesh: Mapping[str, int] | None = None,
    gpu: "str | Hardware" = "h100",
    batch: int | None = None,
    strategy: str = "auto",
    gdn_strategy: str = "auto",
    expert: str | None = "auto",
    weights: "str | Sequence[str]" = "auto",
    optimizer_bytes: float = 8.0,
) -> Plan:
    """Times, memory and bytes of a model over a mesh, in bfloat16.

    Args:
        model: a preset's name ("qwen3.5-9b"), a checkpoint's directory, or a `Config`.
        tokens: of each row. batch: rows in all; default: one for each rank of the data axis.
        mesh: sizes of the axes "context", "data", "tensor" and "expert"; default: one GPU. Axes lie on hosts in the order
            tensor, context, expert, data: the first are joined by NVLink as far as a host goes.
        gpu: "h100", "h200", or `Hardware` with rates of its own.
        strategy: of attention. gdn_strategy: of the gated delta rule. Both "auto" as at run time.
        expert: axis of the experts; "auto": an axis "expert", else the context axis where they divide over it; None: whole.
        weights: axes that weights lie over besides ("context", "data", or both); "auto": none where each pass fits without,
            else as few as make it fit; "none" or (): none.
        optimizer_bytes: of a parameter, in training (8: two float32 moments).

    Returns:
        A `Plan`; `print(plan)` shows all of it.

    Raises:
        ValueError: unknown names, a mesh over which the model's heads or experts do not divide.

    Example:
        >>> plan = predict("qwen3.5-9b", tokens=1 << 20, mesh={"context": 8}, gpu="h100")
        >>> plan.choices["strategy"][0], plan.choices["gdn_strategy"][0], plan.fits["prefill"]
        ('ring', 'state', True)
        >>> 10 < plan.prefill.seconds < 40
        True
    """
    config, name = _config(model)
    check_count("tokens", tokens, 1)
    machine = Machine.of(mesh, gpu)
    rows = machine.size("data") if batch is None else check_count("batch", batch, 1)
    check_choice("strategy", strategy, STRATEGIES)
    check_choice("gdn_strategy", gdn_strategy, ("auto", *GDN_STRATEGIES))
    check_choice("expert", expert, ("auto", "context", "expert", "data"), optional=True)
    check_number("optimizer_bytes", optimizer_bytes, low=0)
    weights = _named_axes(weights)
    tokens = -(-tokens // (2 * machine.size("context"))) * 2 * machine.size("context")
    choices: dict[str, tuple[str, str]] = {}
    at = _resolved(config, machine, -(-rows // machine.size("data")), tokens, strategy, gdn_strategy, expert, choices)

    passes_of = ("prefill", "train", "decode")
    prefill, train, decode = (_spread_weights(at, each, weights, optimizer_bytes, choices) for each in passes_of)
    assumed = ["half of 400 Gb/s for each GPU between hosts"] if NETWORK in _links(machine) else []
    return Plan(
        name,
        tokens,
        rows,
        machine,
        passes.prefill(prefill),
        passes.training(train, optimizer_bytes),
        passes.decode(decode),
        {
            "prefill": memory.prefill(prefill),
            "train": memory.training(train, optimizer_bytes),
            "decode": memory.decode(decode),
        },
        choices,
        tuple(assumed),
    )


def _spread_weights(
    at: Setting, what: str, weights: Any, optimizer_bytes: float, choices: dict[str, tuple[str, str]]
) -> Setting:
    """With the axes that weights lie over in this pass, which `choices` is told."""
    axes = _weight_axes(at, what, weights, optimizer_bytes)
    if at.machine.size("context", "data") > 1 or axes:
        spread = "over " + " and ".join(axes) if axes else "whole on every rank"
        choices[f"weights in {what}"] = (
            spread,
            "asked for" if weights != "auto" else "along as few axes as make it fit",
        )
    return _with_weights(at, axes)


def smallest_mesh(
    model: "str | Path | Config",
    *,
    tokens: int,
    gpu: "str | Hardware" = "h100",
    what: str = "prefill",
    most: int = 4096,
    **options: Any,
) -> dict[str, int] | None:
    """The smallest context axis (a power of two) over which a pass fits into every GPU's memory; None beyond `most`.

    Args:
        model, tokens, gpu, options: as for `predict`, without a mesh.
        what: "prefill", "train" or "decode". most: GPUs.

    Example:
        >>> smallest_mesh("qwen3.5-9b", tokens=1 << 20, gpu="h100")
        {'context': 4}
    """
    check_choice("what", what, ("prefill", "train", "decode"))
    check_count("most", most, 1)
    ranks = 1
    while ranks <= most:
        if predict(model, tokens=tokens, mesh={"context": ranks}, gpu=gpu, **options).fits[what]:
            return {"context": ranks}
        ranks *= 2
    return None


def _config(model: Any) -> tuple[Config, str]:
    check_instance("model", model, (str, Path, Config), "a preset's name, a checkpoint's directory or a Config")
    if isinstance(model, Config):
        return model, f"{model.family} of {model.num_layers} layers"
    if isinstance(model, Path) or "/" in model or Path(model).is_dir():
        return Config.from_hf(model), Path(model).name
    return Config.preset(model), model.lower()


def _resolved(
    config: Any,
    machine: Any,
    rows: int,
    tokens: int,
    strategy: str,
    gdn_strategy: str,
    expert: str | None,
    choices: dict[str, tuple[str, str]],
) -> Setting:
    """All strategies by name, as `auto` takes them at run time; their reasons go to `choices`."""
    if expert == "auto":
        expert = None
        if config.experts is not None:
            context = machine.size("context") > 1 and config.experts.count % machine.size("context") == 0
            expert = "expert" if machine.size("expert") > 1 else "context" if context else None
    at = Setting(
        config,
        machine,
        weights_of(config, machine, expert, ()),
        rows,
        tokens,
        strategy,
        gdn_strategy,
        "gather",
        expert,
        (),
    )
    context = machine.size("context")
    if strategy == "auto":
        strategy, reason = choose_strategy(**attention_shape(at))
    else:
        reason = "asked for"
    choices["strategy"] = strategy, reason
    rates = Rates(bytes_per_second=machine.rate(machine.link("context")))
    if gdn_strategy == "auto":
        gdn_strategy, reason = (
            choose_gdn(rule_shape(at), context, "zigzag", rates) if context > 1 else ("state", "one rank")
        )
    else:
        reason = "asked for"
    choices["gdn_strategy"] = gdn_strategy, reason
    expert_strategy = "gather"
    if config.experts is not None and expert is not None and machine.size(expert) > 1:
        expert_strategy = choose_expert_strategy("auto", machine.size(expert), config.experts.per_token, "gpu")
        choices["expert_strategy"] = expert_strategy, f"experts over {expert}, {config.experts.per_token} a token"
    return dataclasses.replace(at, strategy=strategy, gdn_strategy=gdn_strategy, expert_strategy=expert_strategy)


def _named_axes(weights: Any) -> "str | tuple[str, ...]":
    """ "auto", or the axes that `weights` names."""
    check_instance("weights", weights, (str, tuple, list), "'auto', 'none' or mesh axes such as ('context', 'data')")
    if isinstance(weights, str):
        check_choice("weights", weights, ("auto", "none", "context", "data"))
        return weights if weights == "auto" else () if weights == "none" else (weights,)
    for name in weights:
        check_choice("weights", name, ("context", "data"))
    if len(set(weights)) != len(weights):
        raise ValueError(f"weights must name each axis once, got {weights}")
    return tuple(weights)


def _weight_axes(at: Setting, each: str, weights: Any, optimizer_bytes: float) -> tuple[str, ...]:
    """Axes over which weights lie in a pass."""
    if weights != "auto":
        return weights
    tries = [
        axes for axes in ((), ("context",), ("data",), ("context", "data")) if all(at.machine.size(a) > 1 for a in axes)
    ]
    for axes in tries:
        found = _with_weights(at, axes)
        need = memory.training(found, optimizer_bytes) if each == "train" else getattr(memory, each)(found)
        if need.fits:
            return axes
    return tries[-1]


def _with_weights(at: Setting, axes: tuple[str, ...]) -> Setting:
    return dataclasses.replace(at, weight_axes=axes, weights=weights_of(at.config, at.machine, at.expert, axes))


def _links(machine: Machine) -> set[str]:
    return {machine.link(name) for name in machine.mesh}
