"""One way to check what callers hand in: arrays, counts, numbers, flags and choices.

Every public call uses these, so that bad input gives one kind of error: TypeError for what is of a wrong type (a list where
an array is due, text where a number is), ValueError for a wrong value (rank, size, dtype, range), with what came, what was
expected and what to do. Values that are traced cannot be read: what depends on them saturates instead, see `to_int32`.
"""

import functools
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")
P = ParamSpec("P")
Kind = Literal["floating", "integer", "signed", "bool", "any"]

INT32 = np.iinfo(np.int32)


class Sizes(dict[str, int]):
    """Sizes by axis name, and in `origin` the array that each comes from."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(sizes)
        self.origin: dict[str, str] = {}


def concrete(x: Any) -> "np.ndarray | None":
    """`x` as NumPy where its value is known now (not traced, on this host), else None."""
    if x is None or isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)


def check_array(
    name: str,
    x: Any,
    axes: str | None = None,
    sizes: MutableMapping[str, int] | None = None,
    *,
    kind: Kind = "floating",
    advice: str = "",
) -> None:
    """Raises unless `x` is an array with these axes.

    Args:
        name: of the argument, for the message.
        x: a `jax.Array`, traced or not, or a `numpy.ndarray`.
        axes: one word an axis, such as "B T N H"; a word that is a number is that size. None takes any rank.
        sizes: sizes by axis name. Names that it holds must agree, others are added: handing one `Sizes` from array to
            array checks that they fit together.
        kind: what its dtype must be.
        advice: what to do, appended to a message about rank or size.
    """
    if not is_array(x):
        raise TypeError(
            f"{name} must be an array{_of_axes(axes)}, got {describe(x)}: convert it with jnp.asarray, outside of the call"
        )
    if not _is_kind(x.dtype, kind):
        raise ValueError(f"{name} must be {_KINDS[kind]}, got {x.dtype}: cast it first")
    if axes is None:
        return
    words = axes.split()
    if len(words) != len(x.shape):
        raise ValueError(
            f"{name} must have {len(words)} axes [{', '.join(words)}], got shape {x.shape}{_advice(advice)}"
        )
    known = {} if sizes is None else sizes
    for axis, (word, size) in enumerate(zip(words, x.shape, strict=True)):
        expected = int(word) if word.isdigit() else known.setdefault(word, size)
        origins = known.origin if isinstance(known, Sizes) else {}
        origin = origins.setdefault(word, name) if expected == size else origins.get(word)
        if size != expected:
            of = f" from that of {origin}" if origin not in (None, name) else ""
            shape = ", ".join(w if w.isdigit() or w not in known else f"{w}={known[w]}" for w in words)
            raise ValueError(
                f"{name} must have shape [{shape}], got {x.shape}: axis {axis} differs{of}{_advice(advice)}"
            )


def is_array(x: Any) -> bool:
    """Whether `x` is an array, or a tracer that stands for one. A `jax.ShapeDtypeStruct` has no values: it is none."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def as_integers(name: str, x: Any, axes: str) -> Any:
    """`x` as an array of integers whose axes are one of the forms in `axes`, such as "B n | n" (() stands for none).

    For the small descriptions of batches (lengths, borders, ids): lists of integers are taken too, and stay in NumPy.
    """
    forms = [form.split() for form in axes.replace("()", "").split("|")]
    shapes = " or ".join(f"[{', '.join(form)}]" for form in forms if form)
    expected = " or ".join((["one integer"] if [] in forms else []) + ([f"integers {shapes}"] if shapes else []))
    if isinstance(x, (list, tuple, int)) and not isinstance(x, bool):
        try:
            x = np.asarray(x)
        except ValueError:  # rows of different lengths
            raise ValueError(f"{name} must be {expected}, got rows of different lengths") from None
        except OverflowError:
            raise ValueError(f"{name} must fit into 64 bits, got {describe(x)}") from None
        if x.dtype == object:
            raise ValueError(f"{name} must be {expected}, of at most 64 bits, got {describe(x.tolist())}")
    if not is_array(x):
        raise TypeError(f"{name} must be {expected}, got {describe(x)}")
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim not in [len(form) for form in forms]:
        raise ValueError(f"{name} must be {expected}, got {describe(x)}")
    return x


def check_count(name: str, value: Any, low: int = 0, high: int | None = None, *, advice: str = "") -> int:
    """`value` as a Python int in [low, high], known at trace time.

    Raises TypeError for what is no integer (booleans and floats included), ValueError for one that is traced or out of range.
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be known at trace time, got a traced value{_advice(advice)}")
    if isinstance(value, (bool, np.bool_)) or (is_array(value) and jnp.issubdtype(value.dtype, jnp.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}{_advice(advice)}")
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {describe(value)}{_advice(advice)}") from None
    if count < low or (high is not None and count > high):
        expected = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {expected}, got {count}{_advice(advice)}")
    return count


def check_index(name: str, value: Any, size: int | None = None) -> None:
    """Raises unless `value`, an integer or an array of them, holds integers; those that are known now, from 0 on and below `size`."""
    if not is_array(value):
        check_count(name, value, 0, None if size is None else size - 1)
        return
    check_array(name, value, kind="integer")
    if not isinstance(value, jax.Array) and value.size:
        if value.min() < 0 or (size is not None and value.max() >= size):
            expected = ">= 0" if size is None else f"in [0, {size - 1}]"
            raise ValueError(f"{name} must be {expected}, got {value.min()} to {value.max()}")


def check_axis(name: str, value: Any, ndim: int) -> int:
    """An axis of an array of `ndim` axes, counted from its start."""
    axis = check_count(name, value, -INT32.max)
    if not -ndim <= axis < ndim:
        raise ValueError(f"{name}={axis} is out of range for an array of {ndim} axes")
    return axis % ndim


def check_mesh_axes(name: str, value: Any, most: int | None = None) -> "str | tuple[str, ...]":
    """Mesh axes: a name, or a tuple (a list) of up to `most` different names; one in a tuple is that one."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (tuple, list)) else None
    if names is None or not all(isinstance(n, str) for n in names):
        raise TypeError(f"{name} must be the name of a mesh axis or a tuple of names, got {describe(value)}")
    if not names or not all(names) or len(set(names)) != len(names):
        raise ValueError(f"{name} must name mesh axes, each once, got {value!r}")
    if most is not None and len(names) > most:
        raise ValueError(f"{name} must name at most {most} mesh axes, got {value!r}")
    return names if len(names) > 1 else names[0]


def check_dtype(name: str, value: Any, *, optional: bool = False) -> "np.dtype | None":
    """`value` as a floating-point dtype; with `optional` None passes through."""
    if value is None and optional:
        return None
    expected = "a floating-point dtype such as jnp.bfloat16" + (" or None" if optional else "")
    try:
        # NumPy takes None for float64, True for nothing, and builds structures from lists.
        known = None if value is None or isinstance(value, (bool, list, tuple, dict)) else jnp.dtype(value)
    except TypeError:
        known = None
    if known is None:
        raise TypeError(f"{name} must be {expected}, got {describe(value)}")
    if not jnp.issubdtype(known, jnp.floating):
        raise ValueError(f"{name} must be {expected}, got {known}")
    return known


def check_precision(name: str, value: Any) -> None:
    """Raises unless `value` is what jax takes as the precision of a product."""
    for given in value if isinstance(value, tuple) and len(value) == 2 else (value,):
        if given is None or isinstance(given, (jax.lax.Precision, jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset)):
            continue
        if not isinstance(given, str):
            raise TypeError(
                f"{name} must be None, a name or a jax.lax.Precision (or two of them), got {describe(value)}"
            )
        try:
            jax.lax.Precision(given)
        except ValueError:
            names = sorted(jax.lax.DotAlgorithmPreset.__members__)
            if given not in names:
                raise ValueError(f"unknown {name} {given!r}: see jax.lax.Precision and DotAlgorithmPreset") from None


def check_callable(name: str, value: Any, expected: str, *, optional: bool = False) -> None:
    """Raises TypeError unless `value` can be called; `expected` says with what."""
    if not (optional and value is None) and not callable(value):
        raise TypeError(f"{name} must be {expected}{' or None' if optional else ''}, got {describe(value)}")


def static_length(name: str, value: Any, high: int | None = None) -> int:
    """A sequence length as a Python int: lengths decide shapes and loops, so they must be known at trace time."""
    per_row = "lengths that are traced or differ between rows go into query_seq_lengths and key_value_seq_lengths"
    return check_count(name, value, 0, high, advice=per_row)


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    low: float | None = None,
    high: float | None = None,
    advice: str = "",
) -> float:
    """`value` as a finite Python float, known at trace time: > above, >= low and <= high where these are given."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be one number known at trace time, got a traced value{_advice(advice)}")
    known = np.asarray(value) if is_array(value) or isinstance(value, (int, float)) else None
    if known is None or known.ndim or isinstance(value, bool) or not jnp.issubdtype(known.dtype, jnp.number):
        raise TypeError(f"{name} must be one number, got {describe(value)}{_advice(advice)}")
    if jnp.issubdtype(known.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {describe(value)}{_advice(advice)}")
    number = float(known)
    wrong = (above is not None and number <= above) or (low is not None and number < low)
    if not math.isfinite(number) or wrong or (high is not None and number > high):
        bounds = [f"{sign} {bound}" for sign, bound in ((">", above), (">=", low), ("<=", high)) if bound is not None]
        raise ValueError(f"{name} must be finite{''.join(' and ' + b for b in bounds)}, got {number}{_advice(advice)}")
    return number


def check_flag(name: str, value: Any, *, optional: bool = False) -> "bool | None":
    """`value` as a Python bool; with `optional` None passes through."""
    if value is None and optional:
        return None
    if not isinstance(value, (bool, np.bool_)):
        expected = "True, False or None" if optional else "True or False"
        raise TypeError(f"{name} must be {expected}, known at trace time, got {describe(value)}")
    return bool(value)


def check_choice(
    name: str, value: Any, choices: Iterable[str], *, optional: bool = False, advice: str = ""
) -> "str | None":
    """`value`, one of the names in `choices`; with `optional` None passes through."""
    if value is None and optional:
        return None
    names = list(choices)
    expected = f"expected one of {names}" + (" or None" if optional else "")
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a name, got {describe(value)}: {expected}{_advice(advice)}")
    if value not in names:
        raise ValueError(f"unknown {name} {value!r}: {expected}{_advice(advice)}")
    return value


def check_instance(
    name: str, value: Any, kind: "type[T] | tuple[type, ...]", expected: str, *, optional: bool = False
) -> None:
    """Raises TypeError unless `value` is of type `kind`, which the message calls `expected`."""
    if not (optional and value is None) and not isinstance(value, kind):
        raise TypeError(f"{name} must be {expected}{' or None' if optional else ''}, got {describe(value)}")


def check_path(name: str, value: Any) -> Path:
    """`value`, the name of a file or directory on a file system, as a path."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(text := os.fspath(value), str):
        raise TypeError(f"{name} must be a path, got {describe(value)}")
    if not text or "\0" in text:  # Path("") would be the current directory
        raise ValueError(f"{name} must be the name of a file or directory, got {text!r}")
    if "://" in text:
        raise NotImplementedError(f"{name} must lie on a (mounted) file system, got {text}")
    return Path(text)


def to_int32(x: Any) -> Any:
    """Integers as int32, saturated: a count beyond int32 is the largest int32, not what is left of its low bits.

    A NumPy array stays one, so that masks made at import touch no device. Arithmetic on the result may still overflow: clip
    to the lengths at hand first, then add.
    """
    if x.dtype == np.int32:
        return x
    info = jnp.iinfo(x.dtype)
    low, high = max(int(info.min), int(INT32.min)), min(int(info.max), int(INT32.max))
    clip = jnp.clip if isinstance(x, jax.Array) else np.clip
    return clip(x, np.asarray(low, x.dtype), np.asarray(high, x.dtype)).astype(np.int32)


def describe(value: Any) -> str:
    """What came, short enough for a message."""
    if is_array(value):
        return f"{value.dtype} {value.shape}"
    try:
        text = repr(value)
    except Exception:  # what is wrong may be why it cannot be shown
        text = "something without a repr"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


_KINDS = {
    "floating": "floating point",
    "integer": "integers",
    "signed": "signed integers",
    "bool": "booleans",
    "any": "numbers",
}


@functools.cache
def _is_kind(dtype: Any, kind: Kind) -> bool:
    if kind == "any":  # not NumPy's objects, texts and times
        return any(jnp.issubdtype(dtype, x) for x in (jnp.number, jnp.bool_, jax.dtypes.extended))
    wanted = {"floating": jnp.floating, "integer": jnp.integer, "signed": jnp.signedinteger, "bool": jnp.bool_}[kind]
    return bool(jnp.issubdtype(dtype, wanted))


def _of_axes(axes: str | None) -> str:
    return "" if axes is None else f" [{', '.join(axes.split())}]"


def _advice(advice: str) -> str:
    return f"; {advice}" if advice else ""


def renamed_arguments(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Lets callers say keyword arguments by the names of before, `old="new"`, with a DeprecationWarning. None is not handed on:
    what it meant is the default now."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> T:
            for old in names.keys() & options.keys():
                warnings.warn(f"{old}= is called {names[old]}= now", DeprecationWarning, stacklevel=2)
                value = options.pop(old)
                if value is not None:
                    options[names[old]] = value
            return function(*args, **options)

        return call

    return decorate
