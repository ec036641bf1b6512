"""What a Qwen3.5, Qwen3.5 MoE or Qwen3-Next model is made of: sizes, read from and written as Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ring_jax import _html, _repr
from ring_jax._checks import INT32, check_choice, check_count, check_flag, check_instance, check_number, check_path
from ring_jax.gdn import Heads
from ring_jax.models import hf
from ring_jax.models.publish import located

FULL, LINEAR = "full_attention", "linear_attention"

# model_type of config.json -> family. A wrapper holds the text model's config under "text_config".
FAMILIES = {
    "qwen3_5": "qwen3_5",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_next": "qwen3_next",
}
# family -> (model_type, architecture) of a text-only checkpoint.
TEXT_ONLY = {
    "qwen3_5": ("qwen3_5_text", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe": ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
    "qwen3_next": ("qwen3_next", "Qwen3NextForCausalLM"),
}


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixture of experts of a layer.

    Fields:
        count: E, experts. per_token: experts that a token goes to.
        size, shared_size: width of each routed expert and of the shared one.
        renormalize: whether the weights of the chosen experts are scaled to sum to one.
        aux_loss: weight of the load-balance loss in training.
    """

    count: int
    per_token: int
    size: int
    shared_size: int
    renormalize: bool = True
    aux_loss: float = 0.001

    def __post_init__(self) -> None:
        for name in ("count", "per_token", "size", "shared_size"):
            check_count(f"Experts({name}=...)", getattr(self, name), 1)
        if self.per_token > self.count:
            raise ValueError(
                f"Experts(per_token=...): a token goes to 1 ... {self.count} experts, got {self.per_token}"
            )
        check_flag("Experts(renormalize=...)", self.renormalize)
        check_number("Experts(aux_loss=...)", self.aux_loss, low=0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of one model. Hashable; field names are ours, `from_hf` and `to_hf` translate.

    Fields:
        family: "qwen3_5", "qwen3_5_moe" or "qwen3_next"; decides names in checkpoints, not mathematics.
        vocab_size: V. hidden_size: D. num_layers: all layers.
        num_heads, num_kv_heads, head_dim: N, K, H of full attention.
        linear: heads of the gated delta rule. conv_width: W of its convolution.
        mlp_size: F of the dense MLP; None where there are experts.
        experts: the mixture of experts; None where the MLP is dense.
        rope_theta, rotary_fraction: rotary embedding and the share of the head that it turns.
        max_positions: longest sequence that the model was made for.
        tie_embeddings: whether the output projection is the embedding.
        layer_types: "linear_attention" or "full_attention" for each layer; () means every fourth is full.
        eos_token_ids: tokens that end a text.

    Raises:
        ValueError: sizes that do not fit together.

    Example:
        >>> Config.preset("qwen3.5-9b").period, Config.preset("qwen3.5-9b").groups
        (4, 8)
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    linear: Heads
    mlp_size: int | None = None
    experts: Experts | None = None
    conv_width: int = 4
    rope_theta: float = 1e7
    rotary_fraction: float = 0.25
    max_positions: int = 262144
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False
    layer_types: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    __repr__, _repr_html_ = _repr.of_fields, _html.of_config

    def __post_init__(self) -> None:
        self._check_values()
        types = tuple(self.layer_types) or tuple(LINEAR if (i + 1) % 4 else FULL for i in range(self.num_layers))
        object.__setattr__(self, "layer_types", types)
        if len(types) != self.num_layers or set(types) - {FULL, LINEAR}:
            raise ValueError(
                f"layer_types must name {self.num_layers} layers, each {FULL!r} or {LINEAR!r}, got {len(types)}: {types}"
            )
        if not {FULL, LINEAR} <= set(types):
            raise ValueError(f"layer_types must hold both {FULL!r} and {LINEAR!r}: the model is a hybrid, got {types}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {self.num_heads}")
        if self.linear.value_heads % self.linear.key_heads:
            raise ValueError(
                f"linear key heads must divide linear value heads, got {self.linear.key_heads} and {self.linear.value_heads}"
            )
        if (self.mlp_size is None) == (self.experts is None):
            raise ValueError("a model has either mlp_size (dense) or experts, not both and not neither")
        rotary = round(self.head_dim * self.rotary_fraction)
        if not 0 < rotary <= self.head_dim or rotary % 2:
            raise ValueError(
                f"rotary_fraction * head_dim must be even and in (0, {self.head_dim}], got "
                f"{self.rotary_fraction} * {self.head_dim} = {rotary}"
            )

    def _check_values(self) -> None:
        """Each field by itself: a Config may come from a file that somebody wrote by hand."""
        check_choice("family", self.family, TEXT_ONLY)
        for name in _COUNTS:
            check_count(name, getattr(self, name), 1)
        check_instance("linear", self.linear, Heads, "ring_jax.gdn.Heads")
        if self.mlp_size is not None:
            check_count("mlp_size", self.mlp_size, 1)
        check_instance("experts", self.experts, Experts, "Experts", optional=True)
        check_number("rope_theta", self.rope_theta, above=0)
        check_number("rotary_fraction", self.rotary_fraction, above=0, high=1)
        check_number("norm_epsilon", self.norm_epsilon, above=0)
        check_flag("tie_embeddings", self.tie_embeddings)
        for name, what in (("layer_types", str), ("eos_token_ids", int)):
            value = getattr(self, name)
            check_instance(name, value, (tuple, list), f"a tuple of {what.__name__}")
            object.__setattr__(self, name, tuple(value))  # a list would leave the Config without a hash
        for name in self.layer_types:
            check_choice("layer_types", name, (LINEAR, FULL))
        for token in self.eos_token_ids:
            check_count("eos_token_ids", token, 0, self.vocab_size - 1)

    @property
    def period(self) -> int:
        """Layers in the smallest pattern whose repetition makes the model: one group, the body of the scan."""
        types = self.layer_types
        return next(
            p for p in range(1, len(types) + 1) if len(types) % p == 0 and types == types[:p] * (len(types) // p)
        )

    @property
    def groups(self) -> int:
        """How often the pattern repeats."""
        return self.num_layers // self.period

    @classmethod
    def preset(cls, name: str) -> Config:
        """A published size: "qwen3.5-0.8b", "qwen3.5-35b-a3b", "qwen3-next-80b-a3b", ...; see `PRESETS`."""
        name = name.lower() if isinstance(name, str) else name
        check_choice("preset", name, sorted(PRESETS))
        return PRESETS[name]

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> Config:
        """From Hugging Face's config: a dict, a config.json, or the directory that holds one. The text model inside
        a multimodal wrapper is found under "text_config".

        Tokens that end a text are, from a directory, those that any of its files names: generation_config.json and the
        tokenizer's settings say more than config.json, and transformers obeys them too.

        Raises:
            ValueError: another architecture, a missing entry, or one of a wrong type or value; file and entry are named.
            NotImplementedError: options that no published checkpoint uses (biases, dense layers among experts, scaled
                RoPE), named.
            FileNotFoundError: no config.json there.
        """
        if isinstance(source, Mapping):
            return _from_hf(hf.Fields(source, "config"))
        path = located(check_path("source", source))
        folder = path if path.is_dir() else None
        path = path if folder is None else folder / hf.CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no config.json at {path}: expected a Hugging Face checkpoint directory")
        return _from_hf(hf.Fields.of(path), folder)

    def to_hf(self) -> dict[str, Any]:
        """The config.json of a text-only checkpoint, as transformers reads it."""
        model_type, architecture = TEXT_ONLY[self.family]
        rope = {"rope_type": "default", "rope_theta": self.rope_theta, "partial_rotary_factor": self.rotary_fraction}
        config: dict[str, Any] = {
            "architectures": [architecture],
            "model_type": model_type,
            **{theirs: getattr(self, ours) for ours, theirs in _PLAIN.items()},
            "linear_num_key_heads": self.linear.key_heads,
            "linear_num_value_heads": self.linear.value_heads,
            "linear_key_head_dim": self.linear.key_size,
            "linear_value_head_dim": self.linear.value_size,
            "hidden_act": "silu",
            "attention_bias": False,
            "layer_types": list(self.layer_types),
            "rope_parameters": rope,
        }
        if self.family != "qwen3_next":
            rope |= {"mrope_section": _mrope_section(round(self.head_dim * self.rotary_fraction) // 2)}
            rope |= {"mrope_interleaved": True}
        if self.mlp_size is not None:
            config["intermediate_size"] = self.mlp_size
        if self.experts is not None:
            config |= {theirs: getattr(self.experts, ours) for ours, theirs in _EXPERTS.items()}
        if self.eos_token_ids:
            ids = list(self.eos_token_ids)
            config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
        return config


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "conv_width",
    "max_positions",
)

_PLAIN = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "conv_width": "linear_conv_kernel_dim",
    "max_positions": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_EXPERTS = {
    "count": "num_experts",
    "per_token": "num_experts_per_tok",
    "size": "moe_intermediate_size",
    "shared_size": "shared_expert_intermediate_size",
    "renormalize": "norm_topk_prob",
    "aux_loss": "router_aux_loss_coef",
}


def _from_hf(outer: hf.Fields, folder: Path | None = None) -> Config:
    family = FAMILIES.get(str(outer.values.get("model_type")))
    if family is None:
        raise ValueError(
            f"{outer.where} describes a model of type {outer.values.get('model_type')!r} "
            f"(architectures {outer.values.get('architectures')}); this loader knows {sorted(FAMILIES)}"
        )
    fields = outer.inside("text_config") if "text_config" in outer.values else outer
    _refuse_unsupported(fields)
    routed = family != "qwen3_5"
    sizes = [*_PLAIN.values(), *(f"linear_{x}" for x in _LINEAR)]
    sizes += _EXPERTS.values() if routed else ["intermediate_size"]
    missing = [name for name in sizes if name not in _OPTIONAL and not fields.has(name)]
    if missing:
        raise ValueError(f"{fields.where} lacks {', '.join(missing)}, which a {family} model needs")
    layers, interval = _count(fields, "num_hidden_layers", high=_MOST), _count(fields, "full_attention_interval", 4)
    types = fields.items("layer_types") or [LINEAR if (i + 1) % interval else FULL for i in range(layers)]
    theta, fraction = _rope(fields)
    # Some wrappers say only at their own level whether embeddings are tied.
    tied = (fields if fields.has("tie_word_embeddings") else outer).read(
        "tie_word_embeddings", check_flag, default=False
    )
    vocabulary = _count(fields, "vocab_size")
    if folder is None:
        ends = (*fields.counts("eos_token_id", vocabulary - 1), *outer.counts("eos_token_id", vocabulary - 1))
    else:
        ends = hf.end_ids(folder, vocabulary)
    try:
        return Config(
            family=family,
            **{ours: _count(fields, theirs) for ours, theirs in _PLAIN.items() if theirs not in _OPTIONAL},
            conv_width=_count(fields, "linear_conv_kernel_dim", 4),
            norm_epsilon=fields.read("rms_norm_eps", check_number, above=0, default=1e-6),
            tie_embeddings=tied,
            linear=Heads(*(_count(fields, f"linear_{name}") for name in _LINEAR)),
            mlp_size=None if routed else _count(fields, "intermediate_size"),
            experts=_experts(fields) if routed else None,
            rope_theta=theta,
            rotary_fraction=fraction,
            layer_types=tuple(types),
            eos_token_ids=tuple(dict.fromkeys(ends)),
        )
    except (TypeError, ValueError) as error:  # entries that do not fit together
        if str(error).startswith(fields.where):
            raise
        raise ValueError(f"{fields.where}: {error}") from error


def _experts(fields: hf.Fields) -> Experts:
    counts = {ours: _count(fields, theirs, high=_MOST) for ours, theirs in _EXPERTS.items() if theirs not in _OPTIONAL}
    renormalize = fields.read("norm_topk_prob", check_flag, default=True)
    return Experts(
        **counts,
        renormalize=renormalize,
        aux_loss=fields.read("router_aux_loss_coef", check_number, low=0, default=0.001),
    )


def _count(fields: hf.Fields, name: str, default: int | None = None, high: int | None = None) -> int:
    return fields.read(name, check_count, 1, high or int(INT32.max), default=default)


_LINEAR = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
# Where a config.json leaves these out, transformers has defaults; sizes have no safe default and must be there.
_OPTIONAL = ("rms_norm_eps", "tie_word_embeddings", "linear_conv_kernel_dim", "norm_topk_prob", "router_aux_loss_coef")
_MOST = 2**16  # layers or experts: more are a damaged file, and would be written out one by one


def _rope(config: hf.Fields) -> tuple[float, float]:
    """theta and rotary fraction: under rope_parameters in new files, at top level in old ones."""
    rope = config.inside("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
    kind = rope.text("rope_type") or rope.text("type") or "default"
    if kind not in ("default", "mrope"):
        raise NotImplementedError(f"RoPE of type {kind!r} is not supported, only 'default'")
    theta = (rope if rope.has("rope_theta") else config).read("rope_theta", check_number, above=0)
    if theta is None:
        raise ValueError(f"{config.where} lacks rope_parameters.rope_theta")
    holder = rope if rope.has("partial_rotary_factor") else config
    return theta, holder.read("partial_rotary_factor", check_number, above=0, high=1, default=0.25)


def _refuse_unsupported(config: hf.Fields) -> None:
    for name, expected in (
        ("hidden_act", ("silu",)),
        ("attention_bias", (False,)),
        ("mlp_only_layers", ((), [])),
        ("decoder_sparse_step", (1,)),
    ):
        value = config.values.get(name)
        if value is not None and value not in expected:
            raise NotImplementedError(
                f"{config.where}: {name}={value!r} is not supported: no published checkpoint uses it"
            )


def _mrope_section(pairs: int) -> list[int]:
    """Sections of the three-axis RoPE in the published ratio 11 : 11 : 10; on text they all turn alike."""
    rest = pairs * 10 // 32
    first = (pairs - rest + 1) // 2
    return [first, pairs - rest - first, rest]


def _preset(
    family: str,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    value_heads: int,
    *,
    mlp: int | None = None,
    experts: Any = None,
    tied: bool = False,
) -> Config:
    return Config(
        family=family,
        vocab_size=151936 if family == "qwen3_next" else 248320,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=256,
        linear=Heads(16, value_heads, 128, 128),
        mlp_size=mlp,
        experts=None if experts is None else Experts(*experts),
        tie_embeddings=tied,
    )


PRESETS = {
    "qwen3.5-0.8b": _preset("qwen3_5", 1024, 24, 8, 2, 16, mlp=3584, tied=True),
    "qwen3.5-2b": _preset("qwen3_5", 2048, 24, 8, 2, 16, mlp=6144, tied=True),
    "qwen3.5-4b": _preset("qwen3_5", 2560, 32, 16, 4, 32, mlp=9216, tied=True),
    "qwen3.5-9b": _preset("qwen3_5", 4096, 32, 16, 4, 32, mlp=12288),
    "qwen3.5-27b": _preset("qwen3_5", 5120, 64, 24, 4, 48, mlp=17408),
    "qwen3.5-35b-a3b": _preset("qwen3_5_moe", 2048, 40, 16, 2, 32, experts=(256, 8, 512, 512)),
    "qwen3.5-122b-a10b": _preset("qwen3_5_moe", 3072, 48, 32, 2, 64, experts=(256, 8, 1024, 1024)),
    "qwen3.5-397b-a17b": _preset("qwen3_5_moe", 4096, 60, 32, 2, 64, experts=(512, 10, 1024, 1024)),
    "qwen3-next-80b-a3b": _preset("qwen3_next", 2048, 48, 16, 2, 32, experts=(512, 10, 512, 512)),
}
