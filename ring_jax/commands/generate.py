"""``ring-jax generate``: a checkpoint continues a text, its prompt spread over all devices.

Without ``--model`` a small hybrid model that comes with the package runs, and without a prompt as well it shows what it
was trained for: a pass key hidden in 16,384 tokens of Python's own documentation, read with one rank and with all.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ring_jax.cli import CommandError, find_devices, need
from ring_jax.commands.options import RULE, sampling_of
from ring_jax.commands.progress import Progress
from ring_jax.context.strategies import StrategyName
from ring_jax.data.passkey import MODEL

if TYPE_CHECKING:
    from ring_jax.commands.session import Answer, Settings

DEMO_TOKENS = 16384
PNG = "ring-jax-ranks.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="Hugging Face checkpoint (default: the bundled model)"
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="text to continue (default: the bundled model's own task)")
    text.add_argument("--prompt-file", metavar="F", help="file with that text, - for standard input")
    parser.add_argument(
        "--context-ranks", type=int, metavar="C", help="devices that share the prompt (default: all of them)"
    )
    _add_new_tokens(parser)
    parser.add_argument(
        "--raw", action="store_true", help="the prompt as it is, without the checkpoint's chat template"
    )
    parser.add_argument(
        "--interactive", action="store_true", help="chat: each line is a question, with what came before it cached"
    )
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="tokens of the prompt that are computed at a time (default: all)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the checkpoint's; float32 on CPUs")
    parser.add_argument(
        "--shard-weights",
        action="store_true",
        help="spread the weights over the devices too (default: where one cannot hold them)",
    )
    parser.add_argument(
        "--png",
        metavar="FILE",
        help=f"where the bundled task draws which rank holds and computes what (default: {PNG})",
    )


def _add_new_tokens(parser: argparse.ArgumentParser) -> None:
    """How many tokens, and how they are drawn."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=None, metavar="N", help="end after so many tokens (default: 128)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: always the most likely token (default)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens of that share (default: 1)",
    )
    parser.add_argument(
        "--top-k", type=int, default=None, metavar="K", help="draw from the K likeliest tokens (default: from all)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of what is drawn: equal seeds give equal texts (default: 0)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    need("tokenizers", "jinja2", "tqdm")
    demo = _check(args)
    prompt, sampling = _prompt(args), sampling_of(args)
    devices = find_devices()
    import jax

    from ring_jax.commands.session import Settings

    ranks = len(devices) if args.context_ranks is None else args.context_ranks
    if not 1 <= ranks <= len(devices):
        raise CommandError(
            f"--context-ranks {ranks}: this machine has {len(devices)} devices ({devices[0].device_kind})"
        )
    several = jax.process_count() > 1
    if several and ranks < len(devices):
        raise CommandError(
            f"--context-ranks {ranks}: all {len(devices)} devices must take part, or processes have none"
        )
    # A text this short `auto` would gather on every rank; the task is to show a ring.
    strategy: StrategyName = "ring" if demo else "auto"
    settings = Settings(args.model or MODEL, args.dtype, args.shard_weights, sampling, args.seed, strategy)
    emulated = " (emulated on one CPU)" if devices[0].platform == "cpu" and len(devices) > 1 else ""
    print(f"devices   {len(devices)} x {devices[0].device_kind}{emulated}")
    if demo:
        each = [ranks] if args.context_ranks is not None or ranks == 1 or several else [1, ranks]
        return _find_the_key(settings, each, args.png or PNG)
    if args.interactive or args.chunk is not None:
        from ring_jax.commands.chat import chat

        chat(settings, ranks, prompt, args)
        return 0
    assert prompt is not None
    _continue(settings, ranks, prompt, args)
    return 0


def _check(args: argparse.Namespace) -> bool:
    """Refuses what cannot run, before anything is loaded; returns whether this is the bundled task."""
    without_prompt = args.prompt is None and args.prompt_file is None and not args.interactive
    if args.interactive and args.prompt_file == "-":
        raise CommandError("--interactive reads standard input: give the text's own file, or --prompt")
    if args.chunk is not None and (without_prompt or args.chunk < 1):
        raise CommandError("--chunk N goes with --prompt or --interactive, and is positive")
    if without_prompt and args.model is not None:
        raise CommandError("give --prompt TEXT or --prompt-file F")
    if args.model is not None and args.model.is_file():
        raise CommandError(f"--model {args.model} is a file: give the directory of a checkpoint")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens must be positive, got {args.max_new_tokens}")
    if without_prompt and args.max_new_tokens is not None:
        raise CommandError("--max-new-tokens goes with --prompt: the bundled task has an answer of its own length")
    if not without_prompt and args.png is not None:
        raise CommandError("--png goes with the bundled task: leave --prompt and --prompt-file out")
    if not 0 <= args.seed < 2**32:
        raise CommandError(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}")
    if "" in args.stop:
        raise CommandError("--stop needs a text, got an empty one")
    if without_prompt:
        need("matplotlib")
    return without_prompt


def _continue(settings: "Settings", ranks: int, prompt: str, args: argparse.Namespace) -> None:
    """Streams what a checkpoint writes after `prompt`."""
    from ring_jax.commands.session import STEPS, Session
    from ring_jax.inference.tokenizer import StopAt, TextStream

    with Progress(STEPS) as progress:
        session = Session.open(settings, ranks, progress)
        ids = session.encode(prompt, raw=args.raw)
        answer, tokens = session.tokens(ids, args.max_new_tokens or 128, progress)
    text = StopAt(TextStream(session.tokenizer), tuple(args.stop))
    print(RULE)
    for token in tokens:
        if token not in session.eos:
            sys.stdout.write(text.add(token))
            sys.stdout.flush()
        if text.stopped:
            break
    print(text.finish())
    print(RULE)
    speed = answer.tokens_per_second
    print(f"decode    {len(answer.tokens)} tokens" + (f", {speed:.1f} tokens/s" if speed else ""))
    print(f"memory    {session.memory()}")


def _find_the_key(settings: "Settings", each: list[int], png: str) -> int:
    """The bundled model on what it was trained for; the exit status says whether every number of ranks found the key."""
    import numpy as np

    from ring_jax.commands.session import STEPS, Session
    from ring_jax.data.passkey import NEEDLE, QUESTION, held_out_text, random_text

    if not (settings.directory / "config.json").is_file():
        raise CommandError(
            f"the bundled model is missing at {settings.directory}: install ring-jax again, or give --model DIR"
        )
    hidden = random_text(np.random.default_rng(settings.seed), DEMO_TOKENS, text=held_out_text())
    needle = NEEDLE.format(key=hidden.key).strip()
    at, length = hidden.prompt.index(needle), len(hidden.answer) + 1
    print(
        f"text      {len(hidden.prompt):,} bytes of Python's documentation; {at / DEMO_TOKENS:.0%} into it: {needle!r}"
    )
    print(f"          and at the end: {QUESTION.strip()!r}")
    answers: dict[int, Answer] = {}
    texts: dict[int, str] = {}
    with Progress(len(each) * (STEPS + length)) as progress:
        for ranks in each:
            session = Session.open(settings, ranks, progress)
            answer, tokens = session.tokens(session.encode(hidden.prompt, raw=True), length, progress)
            with progress.step("decode", f"tokens {session.where}", length) as step:
                for _ in tokens:
                    step.advance()
                step.note = f"{len(answer.tokens)} tokens"
            answers[ranks], texts[ranks] = answer, session.tokenizer.decode(answer.tokens).strip()
    _print_results(answers, texts, hidden.answer)
    _draw(png, each[-1], (DEMO_TOKENS - 1, at, "here the question reads the pass key"))
    return 0 if all(text == hidden.answer for text in texts.values()) else 1


def _print_results(answers: "dict[int, Answer]", texts: dict[int, str], expected: str) -> None:
    """A column for each number of ranks, then what the numbers say."""
    import numpy as np

    found = {ranks: "found" if text == expected else f"NOT found: {text!r}" for ranks, text in texts.items()}
    decode = {ranks: 1e3 / (answer.tokens_per_second or np.inf) for ranks, answer in answers.items()}
    rows = [
        ("", lambda ranks: "1 rank" if ranks == 1 else f"{ranks} ranks", ""),
        ("compile", lambda ranks: f"{answers[ranks].compile_prefill + answers[ranks].compile_decode:.1f} s", "prefill and decode"),
        ("prefill", lambda ranks: f"{answers[ranks].prefill:.1f} s", f"{DEMO_TOKENS:,} tokens"),
        ("decode", lambda ranks: f"{decode[ranks]:.1f} ms", "a token"),
        ("sequence", lambda ranks: f"{answers[ranks].sequence / 2**20:,.0f} MiB", "on each rank: what the compiled prefill holds at once"),
        ("weights", lambda ranks: f"{answers[ranks].weights / 2**20:,.0f} MiB", "on each rank"),
        ("pass key", lambda ranks: found[ranks], f"hidden was {expected!r}"),
    ]  # fmt: skip
    print()
    for name, value, remark in rows:
        print(f"{name:<10}{''.join(f'  {value(ranks):>10}' for ranks in answers)}    {remark}".rstrip())
    print()
    if len(answers) > 1:
        one, many = answers.values()
        steps = min(len(one.logits), len(many.logits))
        a, b = (np.stack(answer.logits[:steps]) for answer in (one, many))
        print(
            f"The logits of the {steps} tokens differ by at most {np.abs(a - b).max():.1e} between 1 rank and {max(answers)} "
            f"(the largest is {np.abs(a).max():.1f}): rounding, no approximation."
        )
        print(_why_no_faster(max(answers)))


def _why_no_faster(ranks: int) -> str:
    import jax

    if jax.devices()[0].platform != "cpu":
        return f"A text this short is soon read on one device; what {ranks} ranks save is memory, and time on longer texts."
    return (
        f"The {ranks} ranks are emulated: they share {os.cpu_count()} CPU cores, do the same work in smaller pieces and copy keys "
        "besides, so they are no faster.\nOn devices of their own they compute at once; what each has to hold shows here too."
    )


def _draw(png: str, ranks: int, mark: tuple[int, int, str]) -> None:
    import jax

    from ring_jax import plot

    if jax.process_index():  # the first one draws
        return
    try:
        plot.ranks(DEMO_TOKENS, ranks, mark=mark, path=png)
    except (OSError, ValueError) as error:  # a directory that may not be written, an unknown ending
        print(f"picture   not drawn: {error}")
    else:
        print(f"picture   {png}: which rank holds and computes what")


def _prompt(args: argparse.Namespace) -> str | None:
    """The text, None where there is none to continue."""
    if args.prompt_file is None:
        text, where = args.prompt, "--prompt"
    else:
        where = args.prompt_file
        try:
            text = sys.stdin.read() if where == "-" else Path(where).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"cannot read {where}: {error}") from error
    if text is None:
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CommandError(f"{where} is not UTF-8: {error}") from error
    if not text:
        raise CommandError(f"{where} is empty: give at least one character to continue")
    return text
