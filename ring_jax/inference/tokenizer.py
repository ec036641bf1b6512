"""Text to tokens and back, by the checkpoint's own tokenizer.json and chat template."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ring_jax._checks import check_count, check_path, describe, is_array
from ring_jax.inference import render
from ring_jax.models import hf
from ring_jax.models.publish import located

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
# A chat template comes with a checkpoint, from anyone: what it may take.
TEMPLATE_SECONDS, TEMPLATE_BYTES, TEMPLATE_GROWTH = 10.0, 1 << 30, 1 << 20


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    Args:
        directory: with tokenizer.json; a chat template in chat_template.jinja or tokenizer_config.json, and token ids
            that end a text in generation_config.json, config.json or tokenizer_config.json, are taken where they are
            there.

    Raises:
        FileNotFoundError: no tokenizer.json. ValueError: it, or another of these files, cannot be read; file and entry
            are named.
        ImportError: the package `tokenizers` (with a chat template also `jinja2`) is missing.
    """

    def __init__(self, directory: str | Path):
        import tokenizers

        directory = located(check_path("directory", directory))
        path = directory / hf.TOKENIZER_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"no {hf.TOKENIZER_FILE} in {directory}: a checkpoint for text needs one; copy it from the checkpoint that "
                "this one was made from"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises bare Exception, and panics of Rust that are none
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = hf.Fields.of(directory / hf.TOKENIZER_SETTINGS)
        special = {name: hf.special_token(settings, name) for name in ("bos_token", "eos_token", "pad_token")}
        self._special = {name: text for name, text in special.items() if text}
        self.chat_template = hf.chat_template(directory)
        self.eos_token_ids = tuple(sorted(hf.end_ids(directory)))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens in it included."""
        return self._encode("text", text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        if isinstance(ids, (str, bytes)) or not (isinstance(ids, Sequence) or (is_array(ids) and ids.ndim == 1)):
            raise TypeError(f"ids must be a sequence of token ids, got {describe(ids)}")
        known = [check_count("a token id", token, 0, 2**32 - 1) for token in ids]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def chat(self, text: str) -> list[int]:
        """Token ids of `text` as a user's message, up to where the answer begins.

        The template runs in a sandbox and in a process of its own, which takes about a tenth of a second.

        Raises:
            ValueError: there is no chat template, or it fails, or it needs more than ten seconds, a GiB of memory, or a
                million characters beyond the text.
        """
        _check_text("text", text)
        return self.conversation([{"role": "user", "content": text}])

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the next answer begins.

        Args:
            messages: each with `role` ("system", "user", "assistant") and `content`, text.

        Raises:
            TypeError: no such messages. ValueError: as for `chat`.
        """
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template: encode the text as it is")
        if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
            raise TypeError(f"messages must be a sequence of messages, got {describe(messages)}")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise TypeError(f"messages[{number}] must have a role and a content, got {describe(message)}")
            _check_text(f"the content of messages[{number}]", message.get("content"))
        known = [{"role": message["role"], "content": message["content"]} for message in messages]
        rendered = _render(self.chat_template, {"messages": known, "add_generation_prompt": True, **self._special})
        return self._encode("the chat template's text", rendered, add_special_tokens=False)

    def _encode(self, name: str, text: str, **options: Any) -> list[int]:
        _check_text(name, text)
        return self._tokenizer.encode(text, **options).ids


class TextStream:
    """Tokens in, text out, as soon as it is certain: bytes of an unfinished character wait for the next token.

    Example:
        >>> from ring_jax.data import passkey
        >>> tokenizer = Tokenizer(passkey.MODEL)
        >>> pieces = TextStream(tokenizer)
        >>> [pieces.add(token) for token in tokenizer.encode("ab")]
        ['a', 'b']
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0  # ids before are out; those between give the context that some tokenizers need for spaces
        self._seen = 0
        self.text = ""

    def add(self, token: int) -> str:
        """The text that this token completes, "" where a character is still incomplete."""
        self._ids.append(token)
        return self._emit(final=False)

    def finish(self) -> str:
        """What still waits, at the end."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._begin : self._seen])
        now = self._tokenizer.decode(self._ids[self._begin :])
        if not final and now.endswith(REPLACEMENT):
            return ""
        self._begin, self._seen = self._seen, len(self._ids)
        piece = now[len(before) :]
        self.text += piece
        return piece


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


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be text, got {describe(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not Unicode, it holds half of a surrogate pair: {error}") from None


def _render(template: str, variables: dict[str, Any]) -> str:
    """The text that a chat template makes; see `render.py` for why another process does it."""
    if importlib.util.find_spec("jinja2") is None:
        raise ModuleNotFoundError(
            "a chat template needs the package jinja2: pip install 'ring-jax[cli]'", name="jinja2"
        )
    given = len(json.dumps(variables))
    request: dict[str, Any] = {"template": template, "variables": variables, "path": sys.path}
    request |= {"bytes": TEMPLATE_BYTES + 32 * given, "characters": TEMPLATE_GROWTH + 4 * given}
    command = [sys.executable, "-S", str(Path(render.__file__))]
    try:
        done = subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, timeout=TEMPLATE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template failed: it took more than {TEMPLATE_SECONDS:g} seconds") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"the chat template failed: its process ended with status {done.returncode}; {last}") from None
    if "error" in answer:
        raise ValueError(f"the chat template failed: {answer['error']}")
    return answer["text"]
