"""Hugging Face checkpoints of Qwen3.5, Qwen3.5 MoE and Qwen3-Next, straight into sharded arrays.

Loading never holds more on the host than the part of one parameter (stacked over the groups of layers) that one device
is about to get; which part of which tensor that is, `names` says. Nothing here needs torch. `saving` is the way back.
"""

from __future__ import annotations

import collections
import functools
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ring_jax._checks import check_dtype, check_flag, check_instance, check_path
from ring_jax._progress import track
from ring_jax.models.qwen3_5.config import Config
from ring_jax.models.qwen3_5.hf import mapping
from ring_jax.models.qwen3_5.hf.safetensors_io import DTYPES, Entry, Meter, Reader
from ring_jax.models.qwen3_5.hf.save import save as save

_EMBED = "model.embed_tokens.weight"
_BLOCK = 1 << 18  # elements that are read at a time: what lies twice on the host, before and after transposition
_SHOWN = 20  # tensors of one kind that an error lists


def load(
    directory: str | Path,
    config: Config,
    specs: Mapping[Any, Any] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    *,
    meter: Meter | None = None,
    verify: bool = True,
) -> dict[Any, Any]:
    """Parameters of a checkpoint, each on its devices.

    Parameter by parameter and shard by shard: only the slices that this process' devices need are read, and the bytes
    read but not yet on a device never exceed one parameter, stacked over the groups of layers.

    Args:
        directory: a Hugging Face checkpoint: ``model.safetensors``, or several files and
            ``model.safetensors.index.json``. Names of text-only models and of the multimodal wrapper are understood;
            tensors of the vision and MTP parts are skipped.
        config: sizes of the model; every tensor is checked against them.
        specs: PartitionSpecs in the model's tree, as `Qwen3_5.param_specs` gives them; None for the default device.
        mesh: the mesh of `specs`.
        dtype: of the parameters, except those that stay float32 (``A_log`` and the norm of GDN layers); None takes
            the dtype of the checkpoint's embedding.
        meter: counts bytes read and not yet on a device.
        verify: check what is read against the checksums that `save` leaves in its files; other files have none.

    Returns:
        Nested dict of arrays: the model's tree, layers of a group under their number.

    Raises:
        ValueError: tensors are missing, unexpected, misshapen or of a dtype that is no float (all listed at once); a
            file is damaged, or differs from what was saved; specs without a mesh.
        FileNotFoundError: no checkpoint there, or one of its files is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from ring_jax.data import passkey
        >>> config = Config.from_hf(passkey.MODEL)
        >>> params = load(passkey.MODEL, config, dtype=jnp.bfloat16)
        >>> params["embed"].shape == (config.vocab_size, config.hidden_size)
        True

    Source: transformers' `modeling_qwen3_5.py`, `modeling_qwen3_5_moe.py` and `modeling_qwen3_next.py` for names and
    layouts of tensors.
    """
    directory = check_path("directory", directory)
    check_instance("config", config, Config, "a ring_jax.models.qwen3_5.Config")
    check_dtype("dtype", dtype, optional=True)
    check_flag("verify", verify)
    check_instance("mesh", mesh, jax.sharding.Mesh, "a jax.sharding.Mesh", optional=True)
    if (specs is None) != (mesh is None):
        raise ValueError(f"specs and mesh belong together, got {'only specs' if mesh is None else 'only a mesh'}")
    with Reader(directory, meter, verify=verify) as reader:
        entries, unexpected = _by_canonical_name(reader)
        plan = mapping.plan(config, entries)
        _check(plan, entries, unexpected, config, reader)
        dtype = _param_dtype(dtype, entries[_EMBED], reader)
        pieces = collections.defaultdict(list)
        for piece in plan.pieces:
            pieces[piece.param].append(piece)
        params: dict[Any, Any] = {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            size = lambda item: math.prod(item[1]) * dtype.itemsize  # noqa: E731
            for path, shape in track(plan.params.items(), "load", unit="B", size=size):
                sharding = None if mesh is None else NamedSharding(mesh, mapping.at(specs, path, "specs"))
                kind = np.dtype(np.float32) if plan.float32(path) else dtype
                fill = functools.partial(_fill, reader, entries, pieces[path], kind, pool)
                _put(params, path, _place(shape, sharding, fill, reader.meter))
    return params


def checkpoint_dtype(directory: str | Path) -> np.dtype:
    """The dtype of a checkpoint, that of its embedding; for Raises see `load`.

    Example:
        >>> from ring_jax.data import passkey
        >>> checkpoint_dtype(passkey.MODEL)
        dtype(bfloat16)
    """
    with Reader(check_path("directory", directory), verify=False) as reader:
        entries, _ = _by_canonical_name(reader)
        return _param_dtype(None, entries.get(_EMBED), reader)


def _param_dtype(dtype: Any, embed: Entry | None, reader: Reader) -> np.dtype:
    if dtype is None and (embed is None or embed.dtype not in DTYPES):
        found = "is missing" if embed is None else f"is {embed.dtype}"
        raise ValueError(f"{_EMBED} {found} in {reader.directory}: expected it as {' or '.join(DTYPES)}")
    return jax.dtypes.canonicalize_dtype(DTYPES[embed.dtype] if dtype is None else dtype)  # type: ignore[union-attr]


def _by_canonical_name(reader: Reader) -> tuple[dict[str, Entry], list[str]]:
    """Tensors of the text model under their canonical names, and names that occur twice."""
    entries: dict[str, Entry] = {}
    twice = []
    for name, entry in reader.entries.items():
        short = mapping.canonical(name)
        if short in entries:
            twice.append(name)
        elif short is not None:
            entries[short] = entry
    return entries, twice


def _check(plan: mapping.Plan, entries: Mapping[str, Entry], twice: list[str], config: Config, reader: Reader) -> None:
    """All that is wrong with the tensors of a checkpoint, in one error."""
    surplus = entries.keys() - plan.tensors.keys()
    if config.tie_embeddings and "lm_head.weight" in surplus:
        surplus.remove("lm_head.weight")
        tied = _same(reader, entries, "lm_head.weight", _EMBED)
    else:
        tied = True
    missing = [f"{name} {shape}" for name, shape in plan.tensors.items() if name not in entries]
    common = [(name, shape, entries[name]) for name, shape in plan.tensors.items() if name in entries]
    problems = {
        "missing": missing,
        "unexpected": [f"{entries[n].name} {entries[n].shape}" for n in sorted(surplus)]
        + [f"{n} twice" for n in twice],
        "of another shape": [f"{e.name} {e.shape}, expected {s}" for _, s, e in common if e.shape != s],
        "of another dtype": [f"{e.name} {e.dtype}" for _, _, e in common if e.dtype not in DTYPES],
        "not equal to the embedding, though the config ties them": [] if tied else ["lm_head.weight"],
    }
    if not any(problems.values()):
        return
    lines = [f"the tensors in {reader.directory} are not those of this config ({config.family}):"]
    for kind, found in problems.items():
        if found:
            more = f" ... and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            lines.append(f"  {len(found)} {kind}: {', '.join(found[:_SHOWN])}{more}")
    lines.append(
        f"Expected are {len(plan.tensors)} tensors of dtype {' or '.join(DTYPES)} (quantised checkpoints are not read); "
        "check that config.json and the safetensors files belong together."
    )
    raise ValueError("\n".join(lines))


def _same(reader: Reader, entries: Mapping[str, Entry], one: str, other: str) -> bool:
    """Whether two tensors hold the same values; read in blocks. Wrong shapes are reported elsewhere."""
    if other not in entries:
        return True
    first, second = entries[one], entries[other]
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    rows = max(1, _BLOCK // max(1, first.shape[-1]))
    for start in range(0, first.shape[0], rows):
        part = (slice(start, min(start + rows, first.shape[0])),)
        a, b = reader.read(first, part), reader.read(second, part)
        reader.meter.placed(a.nbytes + b.nbytes)
        if a.tobytes() != b.tobytes():
            return False
    return True


def _fill(
    reader: Any, entries: Any, pieces: list[mapping.Piece], dtype: Any, pool: Any, box: mapping.Box
) -> tuple[np.ndarray, int]:
    """The part `box` of a parameter, read from its pieces, and the number of bytes that were read."""
    out = np.zeros(mapping.extents(box), dtype)  # no tensor has what fills up the columns of a head

    def copy(piece: mapping.Piece) -> int:
        block = reader.read(entries[piece.tensor], mapping.slices(piece.source))
        target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(piece.target, box, strict=True))
        out[target] = piece.as_param(block)
        return block.nbytes

    met = (part for piece in pieces if (part := piece.meet(box)) is not None)
    return out, sum(pool.map(copy, (block for piece in met for block in piece.split(_BLOCK))))


def _place(
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
    fill: Callable[[mapping.Box], tuple[np.ndarray, int]],
    meter: Meter,
) -> jax.Array:
    """An array from its shards, filled one after the other; devices that hold the same shard share one reading."""
    if sharding is None:
        values, count = fill(tuple((0, size) for size in shape))
        array = jax.block_until_ready(jax.device_put(values))
        meter.placed(count)
        return array
    holders = collections.defaultdict(list)
    indices = sharding.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        assert index is not None
        box = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders[box].append(device)
    shards = {}
    for box, devices in holders.items():
        values, count = fill(box)
        for device in devices:
            shards[device] = jax.device_put(values, device)
        jax.block_until_ready([shards[device] for device in devices])
        del values
        meter.placed(count)
    return jax.make_array_from_single_device_arrays(shape, sharding, [shards[device] for device in indices])


def _put(tree: dict[Any, Any], path: mapping.Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
