"""Bad arguments of every public call: thousands of tries, no silent acceptance, no foreign error, nothing compiled.

What is public, and what each call takes, stands in `tests/arguments`. A new public call without an entry there fails here.
"""

import ast
import importlib
import inspect
import time
from collections import Counter

import jax
import pytest

from tests.arguments import calls, models, pages, plans
from tests.arguments.engine import Call, name_of, outcome, tries

MODULES = (
    "ring_jax",
    "ring_jax.layout",
    "ring_jax.distributed",
    "ring_jax.gdn",
    "ring_jax.moe",
    "ring_jax.nn",
    "ring_jax.pages",
    "ring_jax.models.qwen3_5",
    "ring_jax.inference",
    "ring_jax.data.byte_tokenizer",
    "ring_jax.data.passkey",
    "ring_jax.plan",
)
PAIRS = 60  # tries of two bad arguments, for each call

# Public names without tries, and why. Protocols, and what takes no arguments, need no entry.
_TREE = "a pytree: jax makes it around whatever leaves; what it holds is checked where it is used"
_RESULT = "a result: calls make it, users read it"
_FILES = "reads or writes files: tests/models and tests/inference break those"
_INSIDE = "called by the model, inside its shard_map"
_PROGRAM = "Qwen3_5 makes it, and calls it: its own calls are tried"
_ANY = "takes any pytree, and hands it on"
EXEMPT = {
    **dict.fromkeys(
        (f"ring_jax.plan.result.{name}" for name in ("Memory", "Pass", "Piece", "Piece.times", "Plan")), _RESULT
    ),
    "ring_jax._hardware.Hardware": "facts, written down by those who measure",
    "ring_jax._hardware.Hardware.attention_rate": "the planner asks, with a config's checked head size",
    "ring_jax.layout.BlockCyclic.padded_length": "abstract",
    "ring_jax.layout.BlockCyclic.block_size": "abstract",
    "ring_jax.layout.BlockCyclic.coarsen": "abstract",
    "ring_jax.mask.Mask": _TREE,
    "ring_jax.gdn.mixer.GDNCache": _TREE,
    "ring_jax.models.qwen3_5.cache.Cache": _TREE,
    "ring_jax.models.qwen3_5.past.Chunk": _TREE,
    "ring_jax.models.qwen3_5.past.Chunks": _TREE,
    "ring_jax.models.qwen3_5.cache.Cache.past": _INSIDE,
    "ring_jax.models.qwen3_5.past.Chunk.read": _INSIDE,
    **{f"ring_jax.models.qwen3_5.past.Chunks.{name}": _INSIDE for name in ("specs", "attend", "decode")},
    **{f"ring_jax.models.qwen3_5.program.Program.{name}": _PROGRAM for name in ("__call__", "loss", "decode")},
    **{f"ring_jax.models.qwen3_5.structure.Structure.{name}": _PROGRAM for name in ("of", "layers", "param_specs")},
    "ring_jax.models.qwen3_5.program.Program": _PROGRAM,
    "ring_jax.moe.layer.MoEWeights": _TREE,
    "ring_jax.moe.router.RouterStats": _TREE,
    "ring_jax.moe.router.Routing": _TREE,
    **{f"ring_jax.gdn.stay.Stay.{name}": _ANY for name in ("enter", "leave", "enter_rows", "leave_rows")},
    "ring_jax.gdn.cost.Cost": _RESULT,
    "ring_jax.data.passkey.PassKeyText": _RESULT,
    "ring_jax.inference.generate.Generation": _RESULT,
    "ring_jax.distributed.flags.Flag": "data of the package, not made by users",
    "ring_jax.distributed.start.initialize": "tests/distributed/test_start.py",
    "ring_jax.models.qwen3_5.forward.Output": _RESULT,
    "ring_jax.inference.generate.generate": "tests/inference/test_generate.py",
    "ring_jax.inference.generate.stream": "tests/inference/test_generate.py",
    "ring_jax.inference.engine.Engine": "tests/inference/test_engine.py",
    **{f"ring_jax.inference.engine.Engine.{name}": "tests/inference/test_engine.py" for name in ("submit", "cancel")},
    "ring_jax.inference.requests.Request": _RESULT,
    "ring_jax.inference.requests.Stats": _RESULT,
    "ring_jax.models.qwen3_5.config.Config.from_hf": _FILES,
    "ring_jax.models.qwen3_5.modeling.Qwen3_5.from_pretrained": _FILES,
    "ring_jax.models.qwen3_5.modeling.Qwen3_5.save_pretrained": _FILES,
}


@pytest.fixture(scope="module")
def entries() -> list[Call]:
    groups = (
        calls.layouts,
        calls.processes,
        calls.masks,
        calls.contexts,
        calls.attention,
        calls.rules,
        calls.experts,
        calls.layers,
    )
    return [call for group in (*groups, pages.calls, models.models, models.texts, plans.plans) for call in group()]


@pytest.fixture
def whole_tracebacks():
    """jax hides its own frames by default, and then a foreign error looks like one of ours."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


@pytest.fixture
def compiled():
    """What has been compiled since the test began."""
    found: list[str] = []

    def listen(event: str, seconds: float, **about) -> None:
        if "backend_compile" in event:
            found.append(str(about))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_good_arguments_are_accepted(entries):
    """Else a try would prove nothing."""
    refused = []
    for call in entries:
        try:
            if call.check is not None:
                call.check()
            else:
                call.trace(call.good)
        except Exception as error:
            refused.append(f"{call.name}: {type(error).__name__}: {str(error)[:300]}")
    assert not refused, "\n".join(refused)


def test_bad_arguments_raise_errors_that_help(entries, whole_tracebacks, compiled):
    begin, counts, wrong = time.perf_counter(), Counter[str](), []
    for number, call in enumerate(entries):
        for attempt in tries(call, PAIRS, seed=number):
            counts["tries"] += 1
            before = len(compiled)
            found = outcome(attempt)
            if found is None and len(compiled) > before:
                found = f"compiled: {compiled[before:]}"
            if found is not None:
                counts[found.split(":")[0]] += 1
                wrong.append(f"{attempt} -> {found}")
    kinds = ("silent", "foreign", "wrong type", "kind", "unclear", "compiled")
    print(
        f"\n{counts['tries']} tries of {len(entries)} calls: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
        + f", {time.perf_counter() - begin:.1f} s"
    )
    assert not wrong, f"{len(wrong)} wrong: \n" + "\n".join(wrong[:400])
    assert counts["tries"] > 5000


def public_calls() -> dict[str, object]:
    """Every public function, class and method that takes arguments, by name."""
    found: dict[str, object] = {}
    for module in map(importlib.import_module, MODULES):
        shown = _shown(module)
        for name, value in vars(module).items():
            home = getattr(value, "__module__", None) or ""
            if name.startswith("_") or not (
                home == module.__name__ or (name in shown and home.startswith("ring_jax."))
            ):
                continue
            if inspect.isfunction(value):
                found[name_of(value)] = value
            elif inspect.isclass(value) and not getattr(value, "_is_protocol", False):
                found |= _of_class(value)
    return {name: value for name, value in found.items() if _takes_arguments(value)}


def _shown(module) -> set[str]:
    """What a module shows of others: names that it imports as themselves."""
    imports = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names if alias.asname == alias.name}


def _of_class(cls: type) -> dict[str, object]:
    found: dict[str, object] = {name_of(cls): cls}
    for base in cls.__mro__:
        if not base.__module__.startswith("ring_jax."):
            continue
        for name, value in vars(base).items():
            value = getattr(value, "__func__", value)
            if inspect.isfunction(value) and (not name.startswith("_") or name in ("__call__", "__and__", "__add__")):
                found[name_of(value)] = value
    return found


def _takes_arguments(value: object) -> bool:
    names = inspect.signature(value).parameters
    return bool(names.keys() - {"self", "cls"})


def test_every_public_call_is_tried(entries):
    tried = {call.name for call in entries}
    missing = public_calls().keys() - tried - EXEMPT.keys()
    assert not missing, f"no tries for {sorted(missing)}: add them to tests/arguments, or say in EXEMPT why not"
    unused = EXEMPT.keys() - public_calls().keys() | EXEMPT.keys() & tried
    assert not unused, f"{sorted(unused)} need no exemption"


def test_every_public_call_says_what_it_does():
    bare = [name for name, value in public_calls().items() if not (getattr(value, "__doc__", None) or "").strip()]
    assert not bare, f"no docstring: {sorted(bare)}"
