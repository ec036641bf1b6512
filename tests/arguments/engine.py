"""Tries calls with bad arguments, and says for each what came of it."""

from __future__ import annotations

import inspect
import opcode
import pathlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

import ring_jax
from ring_jax._checks import describe
from tests.arguments.kinds import EITHER, Bad, Errors, Kind

PACKAGE = str(pathlib.Path(ring_jax.__file__).parent)
RAISE = opcode.opmap["RAISE_VARARGS"]


@dataclass(frozen=True)
class Call:
    """A public call: good arguments, the kind of each, and arguments that do not go together.

    Fields:
        target: the function or class, which `name` is derived from.
        good: arguments that it accepts, by name.
        kinds: of the arguments that are tried; the others are only passed along.
        run: makes the call from its arguments (default: the target itself).
        conflicts: arguments that are good by themselves and not together, each with a word that the message must have.
        check: how to see that the good arguments are accepted (default: tracing).
        aliases: other names of arguments in messages.
        traceable: whether its arrays may be traced.
    """

    target: Any
    good: dict[str, Any]
    kinds: dict[str, Kind]
    run: Callable[..., Any] | None = None
    conflicts: tuple[tuple[dict[str, Any], str], ...] = ()
    check: Callable[..., Any] | None = None
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    traceable: bool = True

    @property
    def name(self) -> str:
        return name_of(self.target)

    def __call__(self, arguments: dict[str, Any]) -> Any:
        return (self.run or self.target)(**arguments)

    def trace(self, arguments: dict[str, Any]) -> Any:
        """The call with all its arrays traced."""
        arrays = {name: x for name, x in arguments.items() if _can_be_traced(x)}
        rest = {name: x for name, x in arguments.items() if name not in arrays}
        return jax.eval_shape(lambda arrays: _nothing(self(rest | arrays)), arrays)


def name_of(target: Any) -> str:
    """Module and name, the same however it was reached."""
    target = inspect.unwrap(getattr(target, "__func__", target))
    return f"{target.__module__}.{target.__qualname__}"


def _can_be_traced(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind not in "USOMm"


def _nothing(result: Any) -> None:
    del result  # results need not be arrays


@dataclass(frozen=True)
class Try:
    """A call with bad arguments, and which errors are right for it."""

    call: Call
    bad: dict[str, Bad]
    arguments: dict[str, Any]
    errors: Errors
    traced: bool
    word: str | None = None

    def __str__(self) -> str:
        what = ", ".join(f"{name}: {bad.what}" for name, bad in self.bad.items())
        return f"{self.call.name}({what}){' traced' if self.traced else ''}"


def tries(call: Call, pairs: int, seed: int = 0) -> Iterator[Try]:
    """Every bad value of every argument, `pairs` times two at once, and what does not go together."""
    bad = {name: list(kind.bad(call.good.get(name))) for name, kind in call.kinds.items()}
    has_arrays = any(_can_be_traced(x) for x in call.good.values())
    modes = (False, True) if has_arrays and call.traceable else (False,)
    for name, values in bad.items():
        for value in values:
            for traced in modes:
                if value.traced or not traced:
                    yield Try(call, {name: value}, call.good | {name: value.value}, value.errors, traced)
    chance = random.Random(f"{call.name}{seed}")
    names = sorted(bad)
    for _ in range(pairs if len(names) > 1 else 0):
        two = chance.sample(names, 2)
        found = {name: chance.choice(bad[name]) for name in two}
        traced = chance.choice(modes) and any(value.traced for value in found.values())
        arguments = call.good | {name: value.value for name, value in found.items()}
        yield Try(call, found, arguments, EITHER, traced)
    for overrides, word in call.conflicts:
        label = {name: Bad(describe(value), value, EITHER) for name, value in overrides.items()}
        for traced in modes:
            yield Try(call, label, call.good | overrides, EITHER, traced, word)


def outcome(attempt: Try) -> str | None:
    """None if the error is right, else what is wrong: "silent", "wrong type", "foreign", "kind" or "unclear", with details."""
    try:
        (attempt.call.trace if attempt.traced else attempt.call)(attempt.arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        if not raised_here(error):
            return f"foreign: {_short(error)}"
        if not isinstance(error, attempt.errors):
            return f"kind: {_short(error)}"
        return None if _clear(attempt, str(error)) else f"unclear: {_short(error)}"
    except Exception as error:
        return f"wrong type: {_short(error)}"
    return "silent"


def raised_here(error: BaseException) -> bool:
    """Whether a `raise` in the package made it: the innermost frame is ours, and stands at that instruction."""
    traceback = error.__traceback__
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    return code.co_filename.startswith(PACKAGE) and code.co_code[traceback.tb_lasti] == RAISE


def _clear(attempt: Try, message: str) -> bool:
    """Whether the message names an argument that is wrong (or the word that a conflict must be called by)."""
    if attempt.word is not None:
        return attempt.word in message
    aliases = attempt.call.aliases
    return any(word in message for name in attempt.bad for word in (name, *aliases.get(name, ())))


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
