"""Text to tokens and back, by the checkpoint's own tokenizer.json and chat template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    Args:
        directory: with tokenizer.json; a chat template in chat_template.jinja or tokenizer_config.json, and token ids
            that end a text in generation_config.json or config.json, are taken where they are there.

    Raises:
        FileNotFoundError: no tokenizer.json. ValueError: it cannot be read.
        ImportError: the package `tokenizers` (with a chat template also `jinja2`) is missing.
    """

    def __init__(self, directory: str | Path):
        import tokenizers

        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {directory}: a checkpoint for text needs one")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._settings = _read_json(directory / "tokenizer_config.json")
        self.chat_template = _chat_template(directory, self._settings)
        self.eos_token_ids = _eos(directory, self._settings, self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens in it included."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, text: str) -> list[int]:
        """Token ids of `text` as a user's message, up to where the answer begins.

        Raises:
            ValueError: there is no chat template, or it fails.
        """
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template: encode the text as it is")
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message):
            raise jinja2.TemplateError(message)

        loops = ["jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        environment.globals["raise_exception"] = refuse
        names = ("bos_token", "eos_token", "pad_token")
        special = {name: _content(self._settings[name]) for name in names if self._settings.get(name)}
        messages = [{"role": "user", "content": text}]
        try:
            template = environment.from_string(self.chat_template)
            rendered = template.render(messages=messages, add_generation_prompt=True, **special)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template failed: {error}") from error
        return self._tokenizer.encode(rendered, add_special_tokens=False).ids


class TextStream:
    """Tokens in, text out, as soon as it is certain: bytes of an unfinished character wait for the next token.

    Example:
        >>> pieces = TextStream(tokenizer)  # doctest: +SKIP
        >>> for token in tokens: print(pieces.add(token), end="")  # doctest: +SKIP
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


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _eos(directory: Path, settings: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        config = _read_json(directory / name)
        ids = config.get("eos_token_id")
        ids = config.get("text_config", {}).get("eos_token_id") if ids is None else ids
        found.update([] if ids is None else ids if isinstance(ids, list) else [ids])
    if settings.get("eos_token"):
        found.add(tokenizer.token_to_id(_content(settings["eos_token"])))
    return tuple(sorted(token for token in found if token is not None))


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
