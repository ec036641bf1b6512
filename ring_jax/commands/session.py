"""A loaded model that continues a text step by step, each step timed apart: compile, prefill, compile, decode."""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ring_jax
from ring_jax.cli import CommandError
from ring_jax.commands.progress import Progress
from ring_jax.context.strategies import StrategyName
from ring_jax.inference import Sampling
from ring_jax.inference.sampling import sample
from ring_jax.models.qwen3_5 import COMPILER_OPTIONS

STEPS = 4  # of a session besides the decoded tokens: load, compile and run prefill, compile decode


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of the command line a session needs."""

    directory: Path
    dtype: str | None
    shard_weights: bool
    sampling: Sampling
    seed: int
    strategy: StrategyName = "auto"


@dataclasses.dataclass
class Answer:
    """A text that a session continues, and what that takes.

    Fields:
        tokens: new ids so far, the one that ends the text included. logits: float32 [V] of each, which it was drawn from.
        compile_prefill, prefill, compile_decode, decode: seconds; decode of all tokens but the first, which prefill gives.
        weights, sequence: bytes on each rank: of the parameters, and of what the compiled prefill holds at once besides
            (activations and the cache).
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)
    compile_prefill: float = 0.0
    prefill: float = 0.0
    compile_decode: float = 0.0
    decode: float = 0.0
    weights: int = 0
    sequence: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Of decode."""
        return (len(self.tokens) - 1) / self.decode if self.decode else None

    def add(self, token: jax.Array, logits: jax.Array) -> int:
        """Takes the next token; returns it."""
        self.logits.append(np.asarray(logits, np.float32)[0])
        self.tokens.append(int(np.asarray(token)[0]))
        return self.tokens[-1]


@dataclasses.dataclass(frozen=True)
class Session:
    """A loaded model and its tokenizer."""

    settings: Settings
    model: Any
    tokenizer: Any
    devices: Any

    @classmethod
    def open(cls, settings: Settings, ranks: int, progress: Progress) -> "Session":
        """Loads the checkpoint over the first `ranks` devices."""
        from ring_jax.inference.tokenizer import Tokenizer
        from ring_jax.models.qwen3_5 import Config, Qwen3_5, Sharding

        directory = settings.directory
        devices = jax.devices()[:ranks]
        mesh = jax.sharding.Mesh(np.asarray(devices), ("context",))
        cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh, strategy=settings.strategy)
        with progress.step("load", directory.name or str(directory)) as step:
            try:
                config = Config.from_hf(directory)
                tokenizer = Tokenizer(directory)
                experts = config.experts is not None and config.experts.count % ranks == 0
                sharding = Sharding(cp, expert="context" if experts else None)
                dtype = settings.dtype or ("float32" if devices[0].platform == "cpu" else None)
                if settings.shard_weights or not _fits(directory, devices, dtype):
                    sharding = dataclasses.replace(sharding, weights="context")
                model = Qwen3_5.from_pretrained(directory, dtype=dtype, sharding=sharding)
            except (OSError, TypeError, ValueError, NotImplementedError) as error:
                raise CommandError(f"cannot load {directory}: {error}") from error
            parameters = sum(x.size for x in _parameters(model))
            step.note = (
                f"{config.family}, {config.num_layers} layers, {parameters / 1e6:,.1f} M parameters, {model.dtype}"
            )
        return cls(settings, model, tokenizer, devices)

    @property
    def local_devices(self) -> list[Any]:
        """Those of this process, the only ones whose memory it sees."""
        return [device for device in self.devices if device.process_index == jax.process_index()]

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a text, as `ring_jax.inference.generate` has them."""
        return self.model.config.eos_token_ids

    def encode(self, text: str, *, raw: bool) -> list[int]:
        """Token ids of a prompt, in the checkpoint's chat template where it has one and `raw` does not forbid it."""
        chat = self.tokenizer.chat_template is not None and not raw
        try:
            ids = self.tokenizer.chat(text) if chat else self.tokenizer.encode(text)
        except ValueError as error:
            raise CommandError(str(error)) from error
        vocabulary = self.model.config.vocab_size
        if not ids:
            raise CommandError("the prompt has no token")
        if max(ids) >= vocabulary:
            raise CommandError(
                f"token id {max(ids)} is outside of the model's vocabulary of {vocabulary}: do tokenizer and checkpoint "
                "belong together?"
            )
        return ids

    @property
    def where(self) -> str:
        ranks = len(self.devices)
        return f"over {ranks} ranks" if ranks > 1 else "on one rank"

    def tokens(self, ids: list[int], max_new_tokens: int, progress: Progress) -> tuple[Answer, Iterator[int]]:
        """Compiles and prefills, then compiles decode.

        Returns:
            What is known of the answer, filled in later; and its tokens one by one, each of which decodes when it is asked for.
        """
        limit = self.model.config.max_positions
        if len(ids) + max_new_tokens > limit:
            raise CommandError(
                f"a prompt of {len(ids):,} tokens and {max_new_tokens:,} new ones exceed the model's {limit:,} positions"
            )
        (program, params), key = self.model.split(), jax.random.key(self.settings.seed)
        prompt, static = jnp.asarray([ids], jnp.int32), (program, self.settings.sampling)
        answer = Answer(weights=sum(_on_device(x, self.local_devices[0]) for x in jax.tree.leaves(params)))
        with progress.step("compile", f"prefill {self.where}") as step:
            prefill = _prefill.lower(*static, max_new_tokens, params, prompt, key).compile()
        answer.compile_prefill = step.stop()
        memory = prefill.memory_analysis()
        answer.sequence = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else 0
        with progress.step("prefill", f"{len(ids):,} tokens {self.where}") as step:
            last, logits, cache = jax.block_until_ready(prefill(params, prompt, key))
            answer.prefill = step.stop()
            step.note = f"{len(ids) / answer.prefill:,.0f} tokens/s"
        first = answer.add(last, logits)
        if first in self.eos or max_new_tokens == 1:
            return answer, iter([first])
        with progress.step("compile", f"decode {self.where}") as step:
            decode = _decode.lower(*static, params, last, cache, key).compile()
        answer.compile_decode = step.stop()

        def going_on() -> Iterator[int]:
            nonlocal last, cache
            yield first
            while answer.tokens[-1] not in self.eos and len(answer.tokens) < max_new_tokens:
                begin = time.perf_counter()
                last, logits, cache = decode(params, last, cache, jax.random.fold_in(key, len(answer.tokens)))
                token = answer.add(last, logits)
                answer.decode += time.perf_counter() - begin
                yield token

        return answer, going_on()

    def memory(self) -> str:
        """Bytes on each device: the most so far where the device counts them, else those of live arrays."""
        stats = [device.memory_stats() or {} for device in self.local_devices]
        if all("peak_bytes_in_use" in s for s in stats):
            sizes, what = [s["peak_bytes_in_use"] for s in stats], "at most"
        else:
            arrays, what = jax.live_arrays(), "arrays now"
            sizes = [sum(_on_device(x, device) for x in arrays) for device in self.local_devices]
        return f"{what} {', '.join(f'{size / 2**20:,.0f}' for size in sizes)} MiB on the devices"


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=COMPILER_OPTIONS)
def _prefill(program: Any, sampling: Sampling, room: int, params: Any, tokens: jax.Array, key: jax.Array) -> Any:
    out = program(params, tokens, logits="last", cache_room=room)
    return sample(out.logits, key, sampling), out.logits, out.cache


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _decode(program: Any, sampling: Sampling, params: Any, token: jax.Array, cache: Any, key: jax.Array) -> Any:
    logits, cache = program.decode(params, token, cache)
    return sample(logits, key, sampling), logits, cache


def _fits(directory: Path, devices: Any, dtype: str | None) -> bool:
    """Whether every device can hold all weights, and as much again for the rest."""
    from ring_jax.models.qwen3_5.hf.load import checkpoint_dtype

    stored = checkpoint_dtype(directory)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    size = size * jnp.dtype(dtype or stored).itemsize // stored.itemsize
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None and devices[0].platform == "cpu":  # emulated devices share the memory
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return limit is None or 2 * size < limit


def _on_device(array: jax.Array, device: Any) -> int:
    return sum(shard.data.nbytes for shard in array.addressable_shards if shard.device == device)


def _parameters(model: Any) -> list[Any]:
    return jax.tree.leaves(nnx.state(model, nnx.Param))
