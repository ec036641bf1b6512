"""Trains a small Qwen3.5 to read, and to find a pass key hidden in a long text.

Three gated delta rule layers to one of full attention, bytes as tokens, Python's own documentation as text. A five-digit
key is hidden at a random place of every text and asked for at the end; texts grow from hundreds of tokens to 32K. The
model that comes with ring_jax (`ring_jax/data/passkey`) was trained by this script. Nothing is downloaded.

    pip install "ring-jax[cli]"

    # A CPU, a minute or two: the loss falls, the key is not found yet.
    python examples/train_qwen3_5.py --config tiny --out runs/tiny
    # The same over eight emulated devices, two groups of texts, each text over four devices.
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
        python examples/train_qwen3_5.py --config tiny --data 2 --context 4 --out runs/spread
    # The bundled model, on one Hopper GPU, six minutes.
    python examples/train_qwen3_5.py --config bundled --compute bfloat16 --implementation mosaic \\
        --max-seconds 335 --seed 2 --out runs/bundled
    # Eight GPUs, each text over four. Ctrl-C and SIGTERM save and end the run; the same command with --resume goes on, over
    # any number of GPUs.
    python examples/train_qwen3_5.py --config bundled --data 2 --context 4 --out runs/eight --resume
    # In several processes, here four on a CPU; over several hosts: examples/multi_host.
    ring-jax launch --processes 4 --cpu examples/train_qwen3_5.py --data 2 --context 2 --out runs/four

A run leaves in --out: checkpoints/ (Orbax, to resume), model/ (safetensors and tokenizer, for transformers or
`ring-jax generate --model`), loss.png and metrics.json (with the share of keys found in texts never seen).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import ring_jax
from ring_jax.data.byte_tokenizer import END, tokens_of, write_byte_tokenizer
from ring_jax.data.passkey import held_out_text, random_text, training_row, training_text
from ring_jax.gdn import Heads
from ring_jax.models.qwen3_5 import COMPILER_OPTIONS, Config, Qwen3_5, Sharding
from ring_jax.training import checkpoint

ANSWER = 7  # tokens: five digits, a full stop, the end
ANSWER_SHARE = 0.5  # the answers in a text weigh half as much as the rest
LOG_EVERY = 10  # steps


@dataclasses.dataclass(frozen=True)
class Stage:
    """Texts of one length. share: of the run's steps, or of its time if that ends it; batch: texts of a step; asked: how
    often a text asks for the key, at most."""

    share: float
    length: int
    batch: int
    asked: int = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and how it is trained. checks: (length, number) of the texts that it is tried on at the end."""

    model: Config
    stages: tuple[Stage, ...]
    steps: int
    learning_rate: float
    checks: tuple[tuple[int, int], ...]


BYTES: dict[str, Any] = {"family": "qwen3_5", "vocab_size": 264, "tie_embeddings": True, "rope_theta": 1e6}
BYTES["eos_token_ids"] = (END,)
TINY = Recipe(
    Config(
        **BYTES, hidden_size=64, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=32, linear=Heads(2, 2, 32, 32),
        mlp_size=128, max_positions=4096),
    stages=(Stage(0.7, 192, 16, 3), Stage(0.3, 256, 12)),
    steps=100, learning_rate=5e-3, checks=((256, 32), (512, 16)),
)  # fmt: skip
BUNDLED = Recipe(
    Config(
        **BYTES, hidden_size=128, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64, linear=Heads(2, 4, 32, 32),
        mlp_size=384, max_positions=32768),
    stages=(Stage(0.35, 256, 128, 4), Stage(0.25, 1024, 32, 6), Stage(0.15, 4096, 8, 6), Stage(0.12, 16384, 4, 4),
            Stage(0.13, 32768, 4, 4)),
    steps=2200, learning_rate=5e-3, checks=((1024, 100), (4096, 100), (16384, 100), (24576, 60)),
)  # fmt: skip


def texts(random: np.random.Generator, stage: Stage, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a step, int32 [B, S], and what each counts in the loss, float32 [B, S]."""
    rows, weights = [], np.ones((stage.batch, stage.length), np.float32)
    for weight in weights:
        row, answers = training_row(random, stage.length, stage.asked, text=text, end=chr(END))
        rows.append(row)
        for place in answers:
            weight[place : place + ANSWER] = ANSWER_SHARE * stage.length / (ANSWER * len(answers))
    return tokens_of(rows), weights


def make_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """AdamW, clipped, with warm-up and cosine decay over the *progress*, 0 to 1, that each update is told: a run may
    end by its steps or by its time."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 30, 1000, 0.03 * learning_rate)

    def scale(updates: Any, state: Any, params: Any = None, *, progress: jax.Array, **_: Any) -> tuple[Any, Any]:
        rate = schedule(1000 * progress)
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        # Matrices only; stacked over groups of layers they have three dimensions.
        optax.add_decayed_weights(0.05, lambda params: jax.tree.map(lambda p: p.ndim > 2, params)),
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scale),
    )


def place(x: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """An array that every process has whole, spread over the devices of all."""
    if sharding is None or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


class Trainer:
    """Model and optimizer, and the compiled step of each stage."""

    def __init__(self, model: Qwen3_5, optimizer: nnx.Optimizer, stages: tuple[Stage, ...]):
        whole = spread = each = None
        self.ranks = 1
        if model.sharding is not None:
            mesh = model.sharding.resolve_mesh()
            spread = jax.NamedSharding(mesh, jax.P(model.sharding.batch, model.sharding.sequence))
            whole, each = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P(mesh.axis_names))
            self.ranks = mesh.size
        self.shardings = spread, each, whole
        self.both = model, optimizer
        graph, self.state = nnx.split(self.both)
        self.state = jax.tree.map(lambda x: place(x, whole), self.state)

        def step(state: Any, tokens: jax.Array, weights: jax.Array, progress: jax.Array, told: jax.Array) -> Any:
            model, optimizer = nnx.merge(graph, state)
            loss, grads = nnx.value_and_grad(lambda model: model.loss(tokens, weights=weights))(model)
            optimizer.update(model, grads, progress=progress)
            return nnx.state((model, optimizer)), (loss, jnp.max(told, axis=0))

        shapes = jax.eval_shape(lambda: self.state)
        inputs = (whole, spread, spread, whole, each)
        jitted = jax.jit(
            step, donate_argnums=0, in_shardings=inputs, out_shardings=whole, compiler_options=COMPILER_OPTIONS
        )

        def compile(stage: Stage) -> Any:
            tokens = jax.ShapeDtypeStruct((stage.batch, stage.length), jnp.int32)
            told = jax.ShapeDtypeStruct((self.ranks, 2), jnp.float32)
            return jitted.lower(shapes, tokens, tokens.update(dtype=jnp.float32), np.float32(0), told).compile()

        self.compiled: dict[Stage, Future] = {stage: Future() for stage in stages}

        def compile_all() -> None:
            for stage, future in self.compiled.items():
                try:
                    future.set_result(compile(stage))
                except BaseException as error:
                    future.set_exception(error)

        # The next stage compiles while one trains. A daemon: what ends the run does not wait for it.
        threading.Thread(target=compile_all, daemon=True).start()

    def ready(self, stage: Stage, seconds: float) -> bool:
        """Whether the step of a stage is compiled, waiting so long for it."""
        try:
            self.compiled[stage].exception(seconds)
        except TimeoutError:
            return False
        return True

    def step(self, stage: Stage, texts: tuple[np.ndarray, ...], progress: float, told: tuple[float, float]) -> Any:
        """One update. The loss, and the largest of what all processes tell, both still being computed."""
        spread, each, whole = self.shardings
        inputs = [place(x, spread) for x in texts]
        everyone = place(np.tile(np.float32(told), (self.ranks, 1)), each)
        run = self.compiled[stage].result()
        self.state, known = run(self.state, *inputs, place(np.float32(progress), whole), everyone)
        return known

    def modules(self) -> tuple[Qwen3_5, nnx.Optimizer]:
        """Model and optimizer as they are now."""
        nnx.update(self.both, self.state)
        return self.both


def stage_at(progress: float, stages: tuple[Stage, ...]) -> Stage:
    """The stage of a run whose progress goes from 0 to 1."""
    ends = np.cumsum([stage.share for stage in stages]) / sum(stage.share for stage in stages)
    return stages[min(int(np.searchsorted(ends, progress, side="right")), len(stages) - 1)]


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """The SIGINT or SIGTERM that has come, in a list: a run ends between two steps. A second one ends it at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python takes none
        yield came
        return

    def note(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(args: argparse.Namespace, recipe: Recipe, model: Qwen3_5, begin: float) -> list[tuple[int, float]]:
    """Trains in place; (step, mean loss of the last steps) every few steps. begin: when the run's time began.

    Processes must agree on every step: what one alone knows, a signal or its clock, it tells with a step, and all act on it
    when they have read that step's loss.
    """
    optimizer = nnx.Optimizer(model, make_optimizer(args.learning_rate), wrt=nnx.Param)
    folder, losses, recent, step, before = args.out / "checkpoints", [], list[float](), 0, 0.0
    if args.resume:
        restored = checkpoint.restore(folder, model, optimizer)
        step, before, losses = restored.step, restored.extra["progress"], restored.extra["losses"]
        recent = restored.extra.get("recent", [])  # of the steps since the last logged loss
    trainer, text = Trainer(model, optimizer, recipe.stages), training_text()
    first, alone = jax.process_index() == 0, jax.process_count() == 1
    bar = tqdm(initial=step, total=args.steps, desc="compile", disable=None if first else True)
    progress, saved, compiled, pending, agreed = before, step, None, None, (0.0, 0.0)

    def settle() -> None:
        nonlocal pending, agreed
        if pending is not None:
            loss, told = pending
            recent.append(float(loss))
            agreed, pending = tuple(np.asarray(told).tolist()), None

    def save() -> None:
        settle()
        extra = {"progress": progress, "losses": losses, "recent": recent}
        checkpoint.save(folder, step, *trainer.modules(), extra=extra)

    with signals() as came:
        while progress < 1:
            stage = stage_at(progress, recipe.stages)
            while not (came and alone) and not trainer.ready(stage, 0.2):
                pass
            if (came and alone) or agreed[0]:
                break
            compiled = compiled or time.perf_counter()
            here = 0.0
            if args.max_seconds is not None:
                here = (time.perf_counter() - compiled) / (begin + args.max_seconds - compiled)
            # The texts of a step depend on nothing before it: a resumed run sees those that it would have seen.
            inputs = texts(np.random.default_rng((args.seed, step)), stage, text)
            loss = trainer.step(stage, inputs, progress, (came[0] if came else 0.0, here))
            settle()  # one step late, so that the device has work meanwhile
            pending, step = loss, step + 1
            progress = max(step / args.steps, before + (1 - before) * agreed[1])
            if step % LOG_EVERY == 0 or progress >= 1:
                settle()
                losses.append((step, float(np.mean(recent))))
                recent.clear()
                shown = f"{stage.length} tokens, loss {losses[-1][1]:.3f}"
                bar.set_description(shown, refresh=False)
                bar.update(step - bar.n)
                if first and bar.disable and step % (10 * LOG_EVERY) == 0:  # not a terminal
                    print(f"{time.perf_counter() - begin:6.0f} s  step {step:5}  {shown}", flush=True)
            if step % args.save_every == 0 or progress >= 1:
                save()
                saved = step
        bar.close()
        if progress < 1:
            if step > saved:
                save()
            number = came[0] if came else int(agreed[0])
            raise Stopped(number, f"stopped after step {step}: the same command with --resume goes on")
    return losses


class Stopped(SystemExit):
    """A run that a signal has ended, after it was saved; the exit status is the usual one."""

    def __init__(self, number: int, message: str):
        self.status, self.message = 128 + number, message
        super().__init__(self.status)


def retrieval(model: Qwen3_5, length: int, count: int) -> dict[str, Any]:
    """How often the whole answer is the most likely one, in `count` texts never seen, with keys at all depths."""
    graph, state = nnx.split(model)
    whole = None if model.sharding is None else jax.NamedSharding(model.sharding.resolve_mesh(), jax.P())

    @functools.partial(jax.jit, out_shardings=whole)
    def guesses(state: Any, tokens: jax.Array) -> jax.Array:
        out = nnx.merge(graph, state)(tokens, logits="all")
        return jnp.argmax(out.logits[:, -ANSWER - 1 : -1], axis=-1)  # type: ignore[index]

    random, depths, text = np.random.default_rng(length), np.linspace(0, 1, count), held_out_text()
    found = [random_text(random, length - ANSWER, depth, text=text) for depth in depths]
    tokens = tokens_of([x.prompt + x.answer + chr(END) for x in found])
    ranks = 1 if model.sharding is None else model.sharding.resolve_mesh().size
    rows = -(-min(count, max(1, 2**16 // length)) // ranks) * ranks  # of a pass
    tokens = np.resize(tokens, (-(-count // rows) * rows, length))  # the last pass takes some again
    answers = np.concatenate([guesses(state, part) for part in np.split(tokens, len(tokens) // rows)])
    right = np.all(answers == tokens[:, -ANSWER:], axis=1)[:count]
    return {"tokens": length, "texts": count, "exact": right.mean().item(), "missed_depths": depths[~right].tolist()}


def draw(losses: list[tuple[int, float]], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True))
    axes.set(xlabel="step", ylabel="loss, nats per byte (answers weigh a third)", yscale="log")
    figure.savefig(path, dpi=150)


def save_model(model: Qwen3_5, directory: Path) -> None:
    """As a bfloat16 checkpoint with its tokenizer."""
    small = Qwen3_5(model.config, rngs=None, dtype=jnp.bfloat16)
    kinds, values = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (small, model))
    small.set_parameters(jax.tree.map(lambda x, kind: x.astype(kind.dtype), values, kinds))
    with tempfile.TemporaryDirectory() as tokenizer:
        write_byte_tokenizer(tokenizer, max_length=model.config.max_positions)
        small.save_pretrained(directory, tokenizer_from=tokenizer, overwrite=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="tiny, bundled, or a config.json to train as the bundled one")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=positive(int), help="updates (default: the recipe's)")
    parser.add_argument(
        "--max-seconds", type=positive(float), help="end after this time; stages and learning rate adapt"
    )
    parser.add_argument("--learning-rate", type=positive(float), help="the highest (default: the recipe's)")
    parser.add_argument("--data", type=positive(int), default=1, help="ranks that share the texts of a step")
    parser.add_argument("--context", type=positive(int), default=1, help="ranks that share each text")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32", help="dtype of activations")
    parser.add_argument("--implementation", help="of flash attention (default: the best that is proven here)")
    parser.add_argument("--remat", choices=("full", "attention"), help="what the backward pass computes again")
    parser.add_argument(
        "--save-every", type=positive(int), help="steps between checkpoints (default: a tenth of the run, 500 at most)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --out")
    parser.add_argument("--seed", type=positive(int, low=0), default=0, help="of parameters and texts (default: 0)")
    return parser.parse_args(argv)


def positive(kind: type, low: float | None = None) -> Any:
    """Reads a finite number above 0, or from `low`."""

    def read(text: str) -> Any:
        value = kind(text)
        if not math.isfinite(value) or (value <= 0 if low is None else value < low):
            raise argparse.ArgumentTypeError(
                f"expected a number {'above 0' if low is None else f'from {low}'}, got {text}"
            )
        return value

    read.__name__ = kind.__name__  # argparse says so where the text is no number
    return read


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, saves and checks; what metrics.json holds."""
    begin, args = time.perf_counter(), parse(argv)
    ring_jax.distributed.initialize()
    recipe = {"tiny": TINY, "bundled": BUNDLED}.get(args.config)
    try:
        recipe = recipe or dataclasses.replace(BUNDLED, model=Config.from_hf(args.config))
    except (OSError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"--config {args.config}: {error}") from error
    if recipe.model.vocab_size <= END:
        raise SystemExit(
            f"{args.config}: bytes and the end need a vocabulary of {END + 1}, got {recipe.model.vocab_size}"
        )
    args.steps, args.learning_rate = args.steps or recipe.steps, args.learning_rate or recipe.learning_rate
    args.save_every = args.save_every or min(500, -(-args.steps // 10))
    if args.resume and checkpoint.latest_step(args.out / "checkpoints") is None:
        raise SystemExit(f"{args.out} holds no checkpoint to resume from: leave --resume out")
    if not args.resume and checkpoint.latest_step(args.out / "checkpoints") is not None:
        raise SystemExit(f"{args.out} holds checkpoints of an earlier run: give --resume or another --out")
    args.out.mkdir(parents=True, exist_ok=True)

    sharding, ranks, found = None, args.data * args.context, len(jax.devices())
    if ranks > found:
        raise SystemExit(
            f"--data {args.data} --context {args.context} need {ranks} devices, this machine has {found}; "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 emulates eight on a CPU"
        )
    if ranks < found and jax.process_count() > 1:
        raise SystemExit(
            f"--data {args.data} --context {args.context} take {ranks} of the {found} devices of {jax.process_count()} "
            "processes: all must take part"
        )
    if ranks > 1:
        mesh = ring_jax.distributed.mesh(args.context, data=args.data, devices=jax.devices()[:ranks])
        sharding = Sharding(ring_jax.ContextParallel("context", layout="zigzag", batch_axis="data", mesh=mesh))
    options: dict[str, Any] = {"sharding": sharding, "implementation": args.implementation}
    # Parameters and the optimizer's moments are float32 whatever the activations are.
    dtypes = {"dtype": args.compute, "param_dtype": jnp.float32}
    model = Qwen3_5(recipe.model, rngs=nnx.Rngs(args.seed), remat=args.remat, **dtypes, **options)
    count, device = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))), jax.devices()[0].device_kind
    say = print if jax.process_index() == 0 else lambda *_, **__: None
    say(f"{count:,} parameters, {ranks} x {device}")

    losses = train(args, recipe, model, begin)
    if jax.process_index() == 0:
        draw(losses, args.out / "loss.png")
    save_model(model, args.out / "model")

    # What was saved is what is checked.
    model = Qwen3_5.from_pretrained(args.out / "model", dtype=args.compute, **options)
    metrics = {"parameters": count, "device": device, "ranks": ranks, "learning_rate": args.learning_rate}
    metrics |= {"seed": args.seed, "seconds": round(time.perf_counter() - begin, 1), "losses": losses, "retrieval": []}
    for length, number in recipe.checks:
        metrics["retrieval"].append(retrieval(model, length, number))
        say("{tokens:>6} tokens: {exact:.0%} of {texts} keys found".format(**metrics["retrieval"][-1]))
        if jax.process_index() == 0:
            (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def run() -> None:
    """`main`, and out."""
    status = 0
    try:
        main()
    except (Stopped, KeyboardInterrupt) as stop:
        status = stop.status if isinstance(stop, Stopped) else 130
        print(stop.message if isinstance(stop, Stopped) else "interrupted", file=sys.stderr)
    sys.stdout.flush()
    jax.distributed.shutdown()  # of several processes none leaves before the others have saved
    # All is saved. An ordinary exit would wait for a compilation that is under way, or crash in the midst of it.
    os._exit(status)


if __name__ == "__main__":
    run()
