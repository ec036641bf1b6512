"""transformers as the oracle: one row of tokens at a time, on the CPU, float32, eager attention and experts.

Rows run alone because right padding, there, leaves a wrong GDN state behind.
"""

import dataclasses
import pathlib

import numpy as np
import torch
import transformers

OLDEST = (5, 7)  # earlier versions restart the GDN state on a cached call of several tokens


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a prefill of T tokens leaves behind; float32 NumPy arrays, layers in checkpoint order."""

    logits: np.ndarray  # [T, V]
    hidden: np.ndarray  # [L, T, D], what each layer hands to the next
    states: np.ndarray  # [GDN layers, N, dk, dv]
    tails: np.ndarray  # [GDN layers, W - 1, F], the inputs of the convolution for the last tokens
    keys: np.ndarray  # [full layers, T, K, H], after norm and RoPE
    values: np.ndarray  # [full layers, T, K, H]
    router_margin: float  # smallest distance of the logits of the last expert taken and the first not taken


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Greedy decoding of one prompt."""

    tokens: np.ndarray  # [new tokens] int32
    margin: float  # smallest distance of the logits of the first and the second token
    router_margin: float


def load(directory: pathlib.Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The causal language model of a checkpoint; raises where a tensor is missing or unexpected."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        raise RuntimeError(
            f"transformers {transformers.__version__} is older than {OLDEST}, its cached calls are wrong"
        )
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    problems = {kind: names for kind, names in report.items() if names}
    if problems:
        raise RuntimeError(f"{directory} does not fit {type(model).__name__}: {problems}")
    return model.eval()


@torch.inference_mode()
def prefill(model: transformers.PreTrainedModel, tokens: np.ndarray) -> Reference:
    """Everything about one row of tokens [T]."""
    cache = transformers.DynamicCache(config=model.config)
    with _Watch(model) as watch:
        out = model(_row(tokens), past_key_values=cache, use_cache=True)
    width = model.config.linear_conv_kernel_dim
    kinds = model.config.layer_types
    linear = [cache.layers[n] for n, kind in enumerate(kinds) if kind == "linear_attention"]
    full = [cache.layers[n] for n, kind in enumerate(kinds) if kind == "full_attention"]
    return Reference(
        logits=_array(out.logits[0]),
        hidden=np.stack(watch.hidden),
        states=np.stack([_array(layer.recurrent_states[0][0]) for layer in linear]),
        tails=np.stack([_array(layer.conv_states[0][0].T)[1 - width :] for layer in linear]),
        keys=np.stack([_array(layer.keys[0].transpose(0, 1)) for layer in full]),
        values=np.stack([_array(layer.values[0].transpose(0, 1)) for layer in full]),
        router_margin=watch.router_margin,
    )


@torch.inference_mode()
def continue_greedily(model: transformers.PreTrainedModel, tokens: np.ndarray, count: int) -> Continuation:
    """`count` tokens after the prompt [T], by transformers' own `generate`."""
    prompt = _row(tokens)
    with _Watch(model) as watch:
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    first, second = torch.stack([step[0] for step in out.logits]).topk(2).values.unbind(-1)
    new = out.sequences[0, len(tokens) :].numpy().astype(np.int32)
    return Continuation(new, float((first - second).min()), watch.router_margin)


def loss_and_gradients(model: transformers.PreTrainedModel, tokens: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Next-token loss of one row, with the routers' loss where there are experts, and gradients by tensor name."""
    experts = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    loss = model(_row(tokens), labels=_row(tokens), **experts).loss
    loss.backward()
    return loss.item(), {name: _array(parameter.grad) for name, parameter in model.named_parameters()}


class _Watch:
    """Records what layers put out and how clearly routers decide."""

    def __init__(self, model: transformers.PreTrainedModel):
        self.model, self.hidden, self.router_margin, self._hooks = model, [], float("inf"), []

    def __enter__(self) -> "_Watch":
        for layer in self.model.model.layers:
            self._hooks.append(layer.register_forward_hook(self._record))
            if hasattr(layer.mlp, "gate"):
                self._hooks.append(layer.mlp.gate.register_forward_hook(self._measure))
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, module, arguments, out) -> None:
        self.hidden.append(_array(out[0]))

    def _measure(self, module, arguments, out) -> None:
        top = out[0].topk(module.top_k + 1).values
        self.router_margin = min(self.router_margin, float((top[:, -2] - top[:, -1]).min()))


def _row(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(tokens, np.int64))[None]


def _array(x: torch.Tensor) -> np.ndarray:
    return x.float().numpy().copy()
