"""The public calls of models, inference and data, as in `calls.py`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ring_jax import gdn, inference
from ring_jax.data import byte_tokenizer, passkey
from ring_jax.models import qwen3_5
from tests.arguments.calls import HEADS, IMPLEMENTATION, B, context, floats, ints, mesh
from tests.arguments.engine import Call
from tests.arguments.kinds import (
    Arr,
    Axes,
    Choice,
    Count,
    Custom,
    DType,
    Flag,
    Instance,
    Number,
    Text,
    maybe,
)

S, V = 8, 32
SIZES: dict[str, Any] = {
    "family": "qwen3_5",
    "vocab_size": V,
    "hidden_size": 16,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "linear": HEADS,
    "mlp_size": 8,
    "experts": None,
    "conv_width": 4,
    "rope_theta": 1e4,
    "rotary_fraction": 0.5,
    "max_positions": 16,
    "norm_epsilon": 1e-6,
    "tie_embeddings": True,
    "layer_types": (),
    "eos_token_ids": (3,),
}
EXPERTS: dict[str, Any] = {
    "count": 4,
    "per_token": 2,
    "size": 8,
    "shared_size": 8,
    "renormalize": True,
    "aux_loss": 0.1,
}


@functools.cache
def model() -> qwen3_5.Qwen3_5:
    """With zeros for parameters, so that no initialiser runs."""
    made = qwen3_5.Qwen3_5(qwen3_5.Config(**SIZES), rngs=None, dtype=jnp.float32)
    state = nnx.to_pure_dict(nnx.state(made, nnx.Param))
    made.set_parameters(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state))
    return made


def cache() -> qwen3_5.Cache:
    tiny = model()
    made = jax.eval_shape(lambda: tiny(jnp.ones((B, S), jnp.int32), cache_room=4).cache)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), made)


def models() -> list[Call]:
    config, cls = qwen3_5.Config(**SIZES), qwen3_5.Qwen3_5
    counts = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "conv_width")
    sharding = qwen3_5.Sharding(context())
    vocabulary = (("negative", ints(B, S, value=-1)), ("-100", ints(B, S, value=-100)), ("beyond", ints(B, S, value=V)))
    batch: dict[str, Any] = {"tokens": ints(B, S), "lengths": ints(B, value=S), "segment_ids": None}
    batch_kinds: dict[str, Any] = {
        "tokens": Arr("integer", (0,), known=vocabulary),
        "lengths": maybe(Arr("integer", (0,), known=(("zero", [0, 3]), ("beyond", [3, S + 1]), ("negative", [-1, 3])))),
    }
    packed = {"lengths": None, "segment_ids": ints(B, S)}
    other = jax.tree.map(lambda x: x[:1] if x.ndim else x, cache())
    state = nnx.to_pure_dict(nnx.state(model(), nnx.Param))
    wrong = (
        jax.tree.map(lambda x: x[None], state),
        jax.tree.map(lambda x: x.astype(int), state),
        {"embed": state["embed"]},
    )
    full = cache()
    made = jax.eval_shape(lambda: model()(jnp.ones((B, S), jnp.int32), return_new=True).new)
    past = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), made)
    return [
        Call(
            qwen3_5.Config,
            SIZES,
            {name: Count(1) for name in counts}
            | {
                "max_positions": Count(1),
                "family": Choice(),
                "linear": Instance(),
                "mlp_size": maybe(Count(1)),
                "experts": maybe(Custom(("text", 3, [1], qwen3_5.Experts))),
                "rope_theta": Number(above=0),
                "rotary_fraction": Number(above=0, high=1),
                "norm_epsilon": Number(above=0),
                "tie_embeddings": Flag(),
                "layer_types": Custom(types=("full", 3, (3, 4)), values=(("full_attention",) * 4, ("sliding",) * 4)),
                "eos_token_ids": Custom(types=("a", 3, ("a",), (2.5,), (True,)), values=((-1,), (V,))),
            },
            conflicts=(
                ({"num_kv_heads": 3}, "num_kv_heads"),
                ({"mlp_size": None}, "mlp_size"),
                ({"experts": qwen3_5.Experts(**EXPERTS)}, "experts"),
                ({"linear": gdn.Heads(3, 4, 6, 4)}, "heads"),
                ({"rotary_fraction": 0.9}, "rotary_fraction"),
                ({"num_layers": 5, "layer_types": ("full_attention", "linear_attention")}, "layer_types"),
                ({"num_layers": 2}, "hybrid"),
            ),
            aliases={
                "num_layers": ("layer_types", "hybrid"),
                "mlp_size": ("experts",),
                "vocab_size": ("eos_token_ids",),
            },
        ),
        Call(qwen3_5.Config.preset, {"name": "qwen3.5-9b"}, {"name": Choice()}, aliases={"name": ("preset",)}),
        Call(
            qwen3_5.Experts,
            EXPERTS,
            {name: Count(1) for name in ("count", "per_token", "size", "shared_size")}
            | {"renormalize": Flag(), "aux_loss": Number(low=0)},
            conflicts=(({"per_token": 5}, "per_token"),),
        ),
        Call(
            qwen3_5.Sharding,
            {"context": context(), "expert": None, "weights": None, "gdn_strategy": "auto"},
            {"context": Instance(), "expert": maybe(Axes(most=1)), "weights": maybe(Axes()), "gdn_strategy": Choice()},
        ),
        Call(
            qwen3_5.Sharding.spec,
            {"shape": (64, 128), "axes": ("reduced", "heads"), "mesh": mesh("context")},
            {
                "shape": Custom(types=(3, "text", (2.5, 1), (True, 1)), values=((-1, 1), (64,))),
                "axes": Custom(types=(3, "text", (3, 4)), values=(("heads",), ("nonsense", None))),
                "mesh": Instance(),
            },
            sharding.spec,
        ),
        Call(
            qwen3_5.Sharding.check,
            {"config": config, "mesh": mesh("context")},
            {"config": Instance(), "mesh": Instance()},
            sharding.check,
        ),
        Call(
            cls,
            {"config": config, "rngs": None, "dtype": "bfloat16", "param_dtype": None, "sharding": None, "remat": None}
            | {"implementation": None},
            {
                "config": Instance(),
                "rngs": maybe(Instance()),
                "dtype": DType(),
                "param_dtype": maybe(DType()),
                "sharding": maybe(Instance()),
                "remat": maybe(Choice()),
                "implementation": IMPLEMENTATION,
            },
        ),
        Call(
            cls.__call__,
            batch
            | {"logits": "all", "cache_room": 4, "return_hidden": False, "return_stats": False}
            | {"past": None, "return_new": False},
            batch_kinds
            | {
                "logits": Choice(),
                "cache_room": maybe(Count(1)),
                "return_hidden": Flag(),
                "return_stats": Flag(),
                "past": maybe(Instance()),
                "return_new": Flag(),
            },
            model(),
            conflicts=(
                (packed | {"lengths": ints(B)}, "lengths"),
                (packed | {"logits": "last", "cache_room": None}, "segment_ids"),
                (packed, "segment_ids"),
                ({"return_stats": True}, "experts"),
                ({"cache_room": 9}, "positions"),
                ({"tokens": ints(B, 17)}, "positions"),
                ({"tokens": ints(B, 0)}, "tokens"),
            ),
            aliases={"tokens": ("lengths",)},
        ),
        Call(
            cls.__call__,
            batch | packed,
            {"segment_ids": maybe(Arr("signed", (0, 1)))},
            model(),
        ),
        Call(
            cls.__call__,
            {"tokens": ints(B, 3), "past": past, "lengths": ints(B, value=2), "return_new": True},
            {"past": maybe(Instance()), "lengths": maybe(Arr("integer", (0,))), "return_new": Flag()},
            model(),
            conflicts=(
                ({"cache_room": 2}, "without a past"),
                ({"segment_ids": ints(B, 3), "lengths": None, "return_new": False}, "segment_ids"),
                ({"tokens": ints(B + 1, 3), "lengths": None}, "past.lengths"),
                ({"tokens": ints(B, 17), "lengths": None}, "positions"),
            ),
        ),
        Call(
            qwen3_5.Chunks.then,
            {"new": past},
            {"new": Instance()},
            past.then,
        ),
        Call(
            cls.loss,
            batch | {"weights": floats(B, S), "chunk": 4},
            batch_kinds | {"weights": maybe(Arr(bound=(0, 1))), "chunk": Count(1)},
            model().loss,
            conflicts=(
                (packed | {"lengths": ints(B)}, "lengths"),
                ({"tokens": ints(B, 17), "weights": None}, "positions"),
            ),
            aliases={"tokens": ("lengths", "weights")},
        ),
        Call(
            cls.decode,
            {"tokens": ints(B), "cache": full},
            {
                "tokens": Arr("integer", (0,), known=(("negative", [-1, 3]), ("-100", [-100, 3]), ("beyond", [3, V]))),
                "cache": Instance(),
            },
            model().decode,
            conflicts=(({"cache": other}, "cache"),),
        ),
        Call(
            cls.param_specs,
            {"sharding": sharding, "mesh": mesh("context")},
            {"sharding": Instance(), "mesh": Instance()},
            model().param_specs,
        ),
        Call(
            cls.set_parameters,
            {"values": state},
            {"values": Custom(types=(3, "text", [1], np.ones(2), None), values=({}, *wrong), common=False)},
            model().set_parameters,
            check=lambda: model().set_parameters(state),
            traceable=False,
            aliases={"values": ("parameters",)},
        ),
    ]


def texts() -> list[Call]:
    key = jax.random.key(0)
    good = {"key": "48151", "length": 200, "depth": 0.5, "text": "so many words ", "start": 0}
    kinds = {"key": Text((("not_ASCII", "\u00e9"),)), "length": Count(1), "depth": Number(low=0, high=1)}
    kinds |= {"text": maybe(Text((("empty", ""), ("not_ASCII", "\u00e9")))), "start": Count(0)}
    random = np.random.default_rng(0)
    any_text = Text((("empty", ""), ("not_ASCII", "\u00e9")))
    return [
        Call(
            inference.Sampling,
            {"temperature": 0.5, "top_k": 3, "top_p": 0.5},
            {"temperature": Number(low=0), "top_k": maybe(Count(1)), "top_p": Number(above=0, high=1)},
        ),
        Call(
            inference.sample,
            {"logits": floats(B, V), "key": key, "sampling": inference.Sampling()},
            {
                "logits": Arr(),
                "key": Custom(types=(3, "text", [1], len), values=()),
                "sampling": Instance(),
            },
            conflicts=(({"logits": floats(B, 0)}, "logits"), ({"key": floats(2)}, "key")),
        ),
        Call(
            byte_tokenizer.tokens_of,
            {"rows": ["ab", "cd"]},
            {"rows": Custom(types=("ab", 3, [3], [b"ab"], [None]), values=([], ["a", "bc"], ["\u00e9"]))},
        ),
        Call(
            byte_tokenizer.write_byte_tokenizer,
            {"directory": "/nowhere", "max_length": 8},
            {"directory": Custom(types=(3, 2.5, [1])), "max_length": Count(1)},
            check=lambda: None,
        ),
        Call(passkey.pass_key_text, good, kinds, conflicts=(({"length": 20}, "length"),)),
        Call(
            passkey.random_text,
            {"random": random, "length": 200, "depth": 0.5, "text": "so many words "},
            {"random": Instance(), "length": Count(1), "depth": maybe(Number(low=0, high=1)), "text": any_text},
            conflicts=(({"length": 20}, "length"),),
        ),
        Call(
            passkey.training_row,
            {"random": random, "length": 300, "asked": 3, "text": "so many words ", "end": "$"},
            {
                "random": Instance(),
                "length": Count(1),
                "asked": Count(1),
                "text": any_text,
                "end": Text((("empty", ""), ("two", "$$"))),
            },
            conflicts=(({"length": 20}, "length"),),
        ),
    ]
