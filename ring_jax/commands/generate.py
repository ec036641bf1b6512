"""``ring-jax generate``: a checkpoint continues a text, its prompt spread over all devices.

Without ``--model`` a small hybrid model that comes with the package runs, and without a prompt as well it shows what it
was trained for: a pass key hidden in 16,384 tokens of Python's own documentation, read with one rank and with all.
"""

import argparse
import dataclasses
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from ring_jax.cli import CommandError, need, use_all_devices

BUNDLED = Path(__file__).parent.parent / "data" / "passkey"
DEMO_TOKENS = 16384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="Hugging Face checkpoint (default: the bundled model)"
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="text to continue")
    text.add_argument("--prompt-file", metavar="F", help="file with that text, - for standard input")
    parser.add_argument(
        "--context-ranks", type=int, metavar="C", help="devices that share the prompt (default: all of them)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=None, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--raw", action="store_true", help="the prompt as it is, without the checkpoint's chat template"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the checkpoint's; float32 on CPUs")
    parser.add_argument(
        "--shard-weights",
        action="store_true",
        help="spread the weights over the devices too (default: where one cannot hold them)",
    )


def run(args: argparse.Namespace) -> int:
    need("tokenizers", "jinja2")
    use_all_devices()

    import jax

    sampling = _sampling(args)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens must be positive, got {args.max_new_tokens}")
    devices = jax.devices()
    ranks = len(devices) if args.context_ranks is None else args.context_ranks
    if not 1 <= ranks <= len(devices):
        raise CommandError(
            f"--context-ranks {ranks}: this machine has {len(devices)} devices ({devices[0].device_kind})"
        )
    prompt = _prompt(args)
    if "" in args.stop:
        raise CommandError("--stop needs a text, got an empty one")
    if args.model is None and prompt is None and args.max_new_tokens is not None:
        raise CommandError("--max-new-tokens goes with --prompt: the bundled task has an answer of its own length")
    settings = Settings(
        args.model or BUNDLED, args.dtype, args.shard_weights, sampling, args.seed, tuple(args.stop), args.raw
    )
    emulated = " (emulated on one CPU)" if devices[0].platform == "cpu" and len(devices) > 1 else ""
    print(f"devices   {len(devices)} x {devices[0].device_kind}{emulated}")
    if args.model is None and prompt is None:
        each = [ranks] if args.context_ranks is not None or ranks == 1 else [1, ranks]
        return _find_the_key(settings, each)
    if prompt is None:
        raise CommandError("give --prompt TEXT or --prompt-file F")
    session = Session.open(settings, ranks)
    session.answer(prompt, args.max_new_tokens or 128, sys.stdout)
    session.print_memory()
    return 0


@dataclasses.dataclass(frozen=True)
class Settings:
    directory: Path
    dtype: str | None
    shard_weights: bool
    sampling: Any
    seed: int
    stop: tuple[str, ...]
    raw: bool


@dataclasses.dataclass(frozen=True)
class Session:
    """A loaded model and its tokenizer."""

    settings: Settings
    model: Any
    tokenizer: Any
    devices: Any

    @classmethod
    def open(cls, settings: Settings, ranks: int) -> "Session":
        import jax
        import numpy as np

        import ring_jax
        from ring_jax.inference.tokenizer import Tokenizer
        from ring_jax.models.qwen3_5 import Config, Qwen3_5, Sharding

        devices = jax.devices()[:ranks]
        mesh = jax.sharding.Mesh(np.asarray(devices), ("context",))
        cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
        begin = time.perf_counter()
        try:
            config = Config.from_hf(settings.directory)
            tokenizer = Tokenizer(settings.directory)
            experts = config.experts is not None and config.experts.count % ranks == 0
            sharding = Sharding(cp, expert="context" if experts else None)
            dtype = settings.dtype or ("float32" if devices[0].platform == "cpu" else None)
            if settings.shard_weights or not _fits(settings.directory, devices, dtype):
                sharding = dataclasses.replace(sharding, weights="context")
            model = Qwen3_5.from_pretrained(settings.directory, dtype=dtype, sharding=sharding)
        except (OSError, ValueError, NotImplementedError) as error:
            raise CommandError(f"cannot load {settings.directory}: {error}") from error
        parameters = sum(x.size for x in _arrays(model))
        kind = f"{config.family}, {config.num_layers} layers, {parameters / 1e6:,.1f} M parameters, {model.dtype}"
        print(f"model     {settings.directory.name}: {kind}, loaded in {time.perf_counter() - begin:.1f} s")
        return cls(settings, model, tokenizer, devices)

    def answer(self, prompt: str, max_new_tokens: int, out: TextIO) -> str:
        """Generates and prints; returns the text."""
        from ring_jax.inference import generate
        from ring_jax.inference.tokenizer import TextStream

        settings, tokenizer = self.settings, self.tokenizer
        chat = tokenizer.chat_template is not None and not settings.raw
        try:
            ids = tokenizer.chat(prompt) if chat else tokenizer.encode(prompt)
        except ValueError as error:
            raise CommandError(str(error)) from error
        ranks = len(self.devices)
        shared = f"over {ranks} ranks" if ranks > 1 else "on one rank"
        clock = Clock(f"prefill   {len(ids):,} tokens {shared} ...")
        text, first = StopAt(TextStream(tokenizer), settings.stop), True
        eos = tokenizer.eos_token_ids or self.model.config.eos_token_ids

        def show(tokens):
            nonlocal first
            if first:
                clock.stop(" done")
                print("-" * 80, flush=True)
                first = False
            if tokens[0] not in eos:
                out.write(text.add(tokens[0]))
                out.flush()
            return text.stopped

        try:
            result = generate(
                self.model, [ids], max_new_tokens=max_new_tokens, sampling=settings.sampling, seed=settings.seed,
                stop_ids=eos, on_tokens=show,
            )  # fmt: skip
        except ValueError as error:
            clock.stop("")
            raise CommandError(str(error)) from error
        out.write(text.finish() + "\n")
        print("-" * 80)
        print(f"first     token after {result.seconds_to_first:.2f} s (compilation and prefill)")
        speed = f", {result.tokens_per_second:.1f} tokens/s" if result.tokens_per_second else ""
        print(f"decode    {len(result.tokens[0])} tokens{speed}")
        return text.text

    def print_memory(self) -> None:
        """Bytes on each device: the most so far where the device counts them, else those of live arrays."""
        import jax

        stats = [device.memory_stats() or {} for device in self.devices]
        if all("peak_bytes_in_use" in s for s in stats):
            sizes, what = [s["peak_bytes_in_use"] for s in stats], "at most"
        else:
            sizes, what = [0] * len(self.devices), "arrays now"
            index = {device: i for i, device in enumerate(self.devices)}
            for array in jax.live_arrays():
                for shard in array.addressable_shards:
                    if shard.device in index:
                        sizes[index[shard.device]] += shard.data.nbytes
        print(f"memory    {what} {', '.join(f'{size / 2**20:,.0f}' for size in sizes)} MiB on the devices")


class Clock:
    """A line that shows the seconds since it began, on a terminal; elsewhere it is printed once."""

    def __init__(self, line: str):
        self._line, self._over = line, threading.Event()
        print(line, end="", flush=True)
        self._thread = threading.Thread(target=self._tick, daemon=True)
        if sys.stdout.isatty():
            self._thread.start()

    def _tick(self) -> None:
        begin = time.perf_counter()
        while not self._over.wait(1):
            print(f"\r{self._line} {time.perf_counter() - begin:.0f} s", end="", flush=True)

    def stop(self, word: str) -> None:
        """Ends the line with a word."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        print(word, flush=True)


class StopAt:
    """A text stream that ends before the first of some texts; what could begin one waits."""

    def __init__(self, pieces: Any, stops: tuple[str, ...]):
        self._pieces, self._stops, self._out = pieces, stops, 0
        self.stopped = False

    @property
    def text(self) -> str:
        return self._pieces.text[: self._out]

    def add(self, token: int) -> str:
        self._pieces.add(token)
        return self._release(final=False)

    def finish(self) -> str:
        if not self.stopped:
            self._pieces.finish()
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        text = self._pieces.text
        if self.stopped:
            return ""
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, end = True, min(found)
        elif final:
            end = len(text)
        else:
            held = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
            end = len(text) - max(held, default=0)
        begin, self._out = self._out, max(end, self._out)
        return text[begin : self._out]


def _find_the_key(settings: Settings, each: list[int]) -> int:
    """The bundled model on what it was trained for; the exit status says whether every number of ranks found the key."""
    import numpy as np

    from ring_jax.data.passkey import NEEDLE, QUESTION, held_out_text, random_text

    if not (settings.directory / "config.json").is_file():
        raise CommandError(
            f"the bundled model is missing at {settings.directory}: install ring-jax again, or give --model DIR"
        )
    hidden = random_text(np.random.default_rng(settings.seed), DEMO_TOKENS, text=held_out_text())
    needle = NEEDLE.format(key=hidden.key).strip()
    depth = hidden.prompt.index(needle) / len(hidden.prompt)
    print(f"text      {len(hidden.prompt):,} bytes of Python's documentation; {depth:.0%} into it: {needle!r}")
    print(f"          and at the end: {QUESTION.strip()!r}")
    answers = {}
    for ranks in each:
        session = Session.open(settings, ranks)
        answers[ranks] = session.answer(hidden.prompt, len(hidden.answer) + 1, sys.stdout)
        session.print_memory()
    found = {ranks: answer.strip() == hidden.answer for ranks, answer in answers.items()}
    for ranks, ok in found.items():
        where = f"{ranks} ranks" if ranks > 1 else "1 rank"
        print(f"result    {where}: {'found' if ok else 'NOT found'}, {answers[ranks]!r}, hidden was {hidden.key}")
    return 0 if all(found.values()) else 1


def _sampling(args: argparse.Namespace) -> Any:
    from ring_jax.inference import Sampling

    try:
        return Sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _prompt(args: argparse.Namespace) -> str | None:
    if args.prompt_file is None:
        return args.prompt
    try:
        return sys.stdin.read() if args.prompt_file == "-" else Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {args.prompt_file}: {error}") from error


def _fits(directory: Path, devices: Any, dtype: str | None) -> bool:
    """Whether every device can hold all weights, and as much again for the rest."""
    import jax.numpy as jnp

    from ring_jax.models.qwen3_5.pretrained import checkpoint_dtype

    stored = checkpoint_dtype(directory)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    size = size * jnp.dtype(dtype or stored).itemsize // stored.itemsize
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None and devices[0].platform == "cpu":  # emulated devices share the memory
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return limit is None or 2 * size < limit


def _arrays(model: Any) -> list[Any]:
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model, nnx.Param))
