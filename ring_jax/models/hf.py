"""What a Hugging Face checkpoint directory says besides its weights; every entry is checked by value when it is read.

Errors of this module are ValueErrors that name the file and the entry: a file of a wrong type is a wrong value.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ring_jax._checks import check_count, describe

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
TOKENIZER_FILE, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# All that belongs to a tokenizer, the ids that end a text with it.
TOKENIZER_FILES = (
    *(TOKENIZER_FILE, TOKENIZER_SETTINGS, "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", TEMPLATE_FILE, "chat_template.json", GENERATION_FILE),
)


class Fields:
    """Entries of a JSON object. `where` names it in messages; an entry that is null counts as absent.

    Raises:
        ValueError: `values` is no object.

    Example:
        >>> Fields({"hidden_size": "32"}, "config.json").read("hidden_size", check_count, 1)
        Traceback (most recent call last):
        ...
        ValueError: config.json: hidden_size must be an integer, got '32' (str)
    """

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} must be a JSON object, got {describe(values)}")
        self.values, self.where = values, where

    @classmethod
    def of(cls, path: Path) -> Fields:
        """Those of a file; none where it is absent."""
        return cls(read_json(path), str(path)) if path.is_file() else cls({}, str(path))

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def read(self, name: str, check: Callable[..., Any], *args: Any, default: Any = None, **options: Any) -> Any:
        """The entry, as `check(name, value, *args, **options)` of `ring_jax._checks` returns it."""
        if not self.has(name):
            return default
        try:
            return check(f"{self.where}: {name}", self.values[name], *args, **options)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def text(self, name: str) -> str | None:
        return self.read(name, _text)

    def inside(self, name: str) -> Fields:
        """The object under this name; an absent one is empty."""
        return Fields(self.values[name] if self.has(name) else {}, f"{self.where}: {name}")

    def items(self, name: str) -> list[Any] | None:
        return self.read(name, _list)

    def counts(self, name: str, high: int | None = None) -> tuple[int, ...]:
        """One integer or a list of them, from 0 to `high`; () where absent."""
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)):
            return (self.read(name, check_count, 0, high),)
        listed = Fields({str(i): x for i, x in enumerate(value)}, f"{self.where}: {name}")
        if any(x is None for x in value):
            raise ValueError(f"{self.where}: {name} must be integers, got null among them")
        return tuple(listed.read(str(i), check_count, 0, high) for i in range(len(value)))


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON, or no UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def end_ids(directory: Path, vocabulary: int | None = None) -> tuple[int, ...]:
    """Token ids that end a text: all that config.json (there or in its text_config), generation_config.json and the
    tokenizer's `eos_token` name. The one rule for models, tokenizers and the command line.

    Args:
        directory: of a checkpoint; files that are absent name none.
        vocabulary: ids must be smaller.
    """
    high = None if vocabulary is None else vocabulary - 1
    found: list[int] = []
    for name in (CONFIG_FILE, GENERATION_FILE):
        fields = Fields.of(directory / name)
        for place in (fields.inside("text_config"), fields):
            found += place.counts("eos_token_id", high)
    settings = Fields.of(directory / TOKENIZER_SETTINGS)
    token = special_token(settings, "eos_token")
    if token is not None:
        for identity in _token_ids(directory, settings, token):
            found.append(
                Fields({f"eos_token {token!r}": identity}, settings.where).counts(f"eos_token {token!r}", high)[0]
            )
    return tuple(dict.fromkeys(found))


def special_token(settings: Fields, name: str) -> str | None:
    """The text of a special token in tokenizer_config.json, which writes it as text or as an object."""
    if isinstance(settings.values.get(name), Mapping):
        return settings.inside(name).text("content")
    return settings.text(name)


def chat_template(directory: Path) -> str | None:
    """The chat template of chat_template.jinja or else of tokenizer_config.json, None where there is none."""
    path = directory / TEMPLATE_FILE
    if path.is_file():
        return read_text(path)
    settings = Fields.of(directory / TOKENIZER_SETTINGS)
    if not isinstance(settings.values.get("chat_template"), list):
        return settings.text("chat_template")
    for i, named in enumerate(settings.values["chat_template"]):  # several by name
        entry = Fields(named, f"{settings.where}: chat_template[{i}]")
        if entry.text("name") == "default":
            return entry.text("template")
    return None


@dataclasses.dataclass(frozen=True)
class Companions:
    """Files that lie beside a model's weights and go where it goes.

    They are no part of what a model computes: all instances are equal, so that programs compiled for one serve another.
    """

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, directory: Path) -> Companions:
        """The tokenizer, chat template and generation config of a directory; those that are there."""
        found = {name: path.read_bytes() for name in TOKENIZER_FILES if (path := directory / name).is_file()}
        return cls(found)


def _token_ids(directory: Path, settings: Fields, token: str) -> Iterator[int]:
    """The ids of a token: where tokenizer_config.json lists what was added to the vocabulary, or in tokenizer.json."""
    decoder, known = settings.inside("added_tokens_decoder"), False
    for identity in decoder.values:
        if not identity.isdecimal():
            raise ValueError(f"{decoder.where}: token ids must be integers, got {describe(identity)}")
        if decoder.inside(identity).text("content") == token:
            known = True
            yield int(identity)
    if known:
        return
    tokenizer = Fields.of(directory / TOKENIZER_FILE)
    for i, added in enumerate(tokenizer.items("added_tokens") or ()):
        entry = Fields(added, f"{tokenizer.where}: added_tokens[{i}]")
        if entry.text("content") == token and entry.has("id"):
            yield entry.read("id", check_count)
    model = tokenizer.inside("model")
    if isinstance(model.values.get("vocab"), Mapping) and model.inside("vocab").has(token):
        yield model.inside("vocab").read(token, check_count)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {describe(value)}")
    return value


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list, got {describe(value)}")
    return list(value)
