"""What a call of the model refuses, before anything is compiled."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ring_jax._checks import Sizes, check_array, check_instance, concrete, describe
from ring_jax._mesh import axis_size
from ring_jax._segment_ids import check_segment_ids
from ring_jax.gdn import GDNCache
from ring_jax.models.qwen3_5.cache import Cache
from ring_jax.models.qwen3_5.config import FULL, Config
from ring_jax.models.qwen3_5.past import Past
from ring_jax.models.qwen3_5.structure import Structure


def check_inputs(
    model: Structure, params: Any, tokens: Any, lengths: Any, segment_ids: Any, room: int = 0, past: Any = None
) -> None:
    """Raises for shapes and values that do not fit; values only where they are known now."""
    sizes = Sizes()
    check_array("tokens", tokens, "B S", sizes, kind="integer")
    if 0 in tokens.shape:
        raise ValueError(f"tokens must hold at least one token, got shape {tokens.shape}")
    batch, length = tokens.shape
    before = 0 if past is None else check_past(model.config, past, batch, segment_ids)
    if before + length + room > model.config.max_positions:
        cached = f"{before} cached tokens, " if past is not None else ""
        raise ValueError(
            f"{cached}{length} tokens and room for {room} more exceed the model's {model.config.max_positions} positions"
        )
    if lengths is not None and segment_ids is not None:
        raise ValueError("give lengths or segment_ids, not both: padding has negative segment ids")
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "B S", sizes, kind="signed", advice="as the tokens")
        check_segment_ids(segment_ids)
    if lengths is not None:
        check_array("lengths", lengths, "B", sizes, kind="integer")
        known, least = concrete(lengths), 1 if past is None else 0
        if known is not None and not ((known >= least) & (known <= length)).all():
            raise ValueError(f"lengths must be from {least} to {length} (the tokens' S), got {known.tolist()}")
    if model.sharding is not None:
        if model.sharding.context.is_manual:
            raise ValueError("the model is a shard_map of its own: call it outside of yours, on global arrays")
        ranks = axis_size(model.sharding.resolve_mesh(), model.sharding.batch)
        if batch % ranks:
            raise ValueError(
                f"a batch of {batch} does not divide over batch_axis={model.sharding.batch!r} of size {ranks}: pad the "
                "batch, or leave batch_axis out"
            )
    check_has_parameters(params)
    check_vocabulary(model.config, tokens, lengths, segment_ids)


def check_past(config: Config, past: Past, batch: int, segment_ids: Any) -> int:
    """Raises for a past that does not fit; the most tokens that a row of it is known to hold."""
    offers = all(callable(getattr(past, name, None)) for name in ("attend", "decode", "specs"))
    if isinstance(past, type) or not offers:
        raise TypeError(f"past must be a past such as model(..., return_new=True).new, got {describe(past)}")
    if segment_ids is not None:
        raise ValueError("a past is of one text a row: pack no documents (segment_ids) behind it")
    check_instance("past.gdn", past.gdn, GDNCache, "a ring_jax.gdn.GDNCache")
    check_array(
        "past.lengths", past.lengths, "B", {"B": batch}, kind="integer", advice="one for each row of the tokens"
    )
    linear = sum(kind != FULL for kind in config.layer_types[: config.period])
    sizes = {"G": config.groups, "L": linear, "B": batch}
    check_array(
        "past.gdn.segment", past.gdn.segment, "G L B", sizes, kind="integer", advice="a past belongs to its model"
    )
    known = concrete(past.lengths)
    return 0 if known is None else int(known.max())


def check_has_parameters(params: Any) -> None:
    """Raises for a model made without `rngs`."""
    if isinstance(params["embed"], jax.ShapeDtypeStruct):
        raise ValueError(
            "this model has no parameters yet (rngs=None): load some with set_parameters or from_pretrained"
        )


def check_vocabulary(config: Config, tokens: Any, lengths: Any, segment_ids: Any) -> None:
    """Raises for ids that are known now and outside of the vocabulary; `pass_.embed` makes NaN of the others."""
    ids = concrete(tokens)
    if ids is None:
        return
    outside = (ids < 0) | (ids >= config.vocab_size)
    if not outside.any():
        return
    known_lengths, known_ids = concrete(lengths), concrete(segment_ids)
    if (lengths is not None and known_lengths is None) or (segment_ids is not None and known_ids is None):
        return  # which tokens are padding is not known yet
    if known_lengths is not None:
        outside &= np.arange(ids.shape[1]) < known_lengths[:, None]
    if known_ids is not None:
        outside &= known_ids >= 0
    if outside.any():
        raise ValueError(
            f"tokens must be in [0, {config.vocab_size - 1}], the model's vocabulary, got {ids[outside][0]}: do "
            "tokenizer and checkpoint belong together? Padding is marked by lengths or negative segment_ids, and "
            "what is not to be learned by weights"
        )


def check_cache(config: Config, cache: Cache) -> None:
    """Raises unless `cache` is one of a model of this config, with room left where its count is known."""
    check_instance("cache", cache, Cache, "a ring_jax.models.qwen3_5.Cache, of model(..., cache_room=...)")
    kinds = 2 * config.layer_types.count(FULL)  # keys and values
    sizes = {"M": kinds, "K": config.num_kv_heads, "H": config.head_dim}
    check_array("cache.prompt_kv", cache.prompt_kv, "M B S K H", sizes, advice="a cache belongs to its model")
    check_array("cache.new_kv", cache.new_kv, "M B R K H", sizes)
    check_array("cache.lengths", cache.lengths, "B", sizes, kind="integer")
    check_array("cache.count", cache.count, "", kind="integer")
    check_instance("cache.gdn", cache.gdn, GDNCache, "a ring_jax.gdn.GDNCache")
    for name in ("state", "tail"):
        check_array(f"cache.gdn.{name}", getattr(cache.gdn, name))


def check_room(cache: Cache) -> None:
    """Raises where no room is known to be left."""
    known = concrete(cache.count)
    if known is not None and known >= cache.room:
        raise ValueError(f"the cache had room for {cache.room} new tokens and holds {known}: ask for more cache_room")
