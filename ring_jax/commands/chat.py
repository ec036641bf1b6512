"""``ring-jax generate --interactive``: turns of a conversation through one engine, and what each found cached."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from ring_jax.cli import CommandError
from ring_jax.commands.options import RULE, sampling_of
from ring_jax.commands.progress import Progress
from ring_jax.inference import Engine, Request
from ring_jax.inference.tokenizer import StopAt, TextStream

if TYPE_CHECKING:
    from ring_jax.commands.session import Session, Settings


def chat(settings: "Settings", ranks: int, prompt: str | None, args: argparse.Namespace) -> None:
    """Answers `prompt`, or with --interactive each line of standard input, the prompt before the first."""
    from ring_jax.commands.session import Session

    with Progress(1) as progress:
        session = Session.open(settings, ranks, progress)
    try:
        # A CPU gives no token faster than people read: one at a time.
        steps = 1 if session.devices[0].platform == "cpu" else 8
        engine = Engine(session.model, rows=1, chunk=args.chunk, decode_steps=steps)
    except ValueError as error:
        raise CommandError(str(error)) from error
    talk = Conversation(session, raw=args.raw)
    if not args.interactive:
        assert prompt is not None
        _answer(engine, talk, prompt, args)
        return
    print("Ask; an empty line or Ctrl-D ends.")
    while line := _line():
        _answer(engine, talk, line if prompt is None else f"{prompt}\n{line}", args)
        prompt = None


class Conversation:
    """All turns so far as token ids: by the checkpoint's chat template, or as they stand."""

    def __init__(self, session: "Session", *, raw: bool):
        self._session, self._messages = session, []  # type: ignore[var-annotated]
        self._ids: list[int] = []
        self._template = session.tokenizer.chat_template is not None and not raw

    def ask(self, text: str) -> list[int]:
        """The ids up to the answer."""
        if not self._template:
            self._ids += self._session.encode(text, raw=True)
            return self._ids
        self._messages.append({"role": "user", "content": text})
        try:
            return self._session.tokenizer.conversation(self._messages)
        except ValueError as error:
            raise CommandError(str(error)) from error

    def answered(self, ids: list[int], text: str) -> None:
        if self._template:
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._ids = [*self._ids, *ids]


def _answer(engine: Engine, talk: Conversation, text: str, args: argparse.Namespace) -> None:
    ids = talk.ask(text)
    begin = time.perf_counter()
    try:
        request = engine.submit(
            ids, max_new_tokens=args.max_new_tokens or 128, sampling=sampling_of(args), seed=args.seed
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    tokenizer, eos = talk._session.tokenizer, talk._session.eos
    pieces = StopAt(TextStream(tokenizer), tuple(args.stop))
    first = 0.0
    print(RULE)
    for token in request:
        first = first or time.perf_counter() - begin
        if token not in eos:
            sys.stdout.write(pieces.add(token))
            sys.stdout.flush()
        if pieces.stopped:
            request.cancel()
            break
    print(pieces.finish())
    print(RULE)
    print(_found(request, first))
    shown: Any = [token for token in request.tokens if token not in eos]
    talk.answered(shown, pieces.text)


def _found(request: Request, first: float) -> str:
    """What the cache had, in a line."""
    return (
        f"prompt    {request.prompt_tokens:,} tokens: {request.hit_tokens:,} cached, {request.prefilled_tokens:,} computed"
        f"{f' ({request.miss_reason})' if request.miss_reason else ''}; first token after {first:.2f} s"
    )


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""
