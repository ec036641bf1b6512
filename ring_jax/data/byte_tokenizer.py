"""A tokenizer whose tokens are bytes: ids 0 to 255, and one that ends a text."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ring_jax._checks import check_count, check_instance, check_path

BYTES = 256
END, END_TEXT = 256, "<|endoftext|>"


def tokens_of(rows: Sequence[str]) -> np.ndarray:
    """Texts of one length as tokens, without the package `tokenizers`.

    Args:
        rows: [B], ASCII and chr(END), one character for each of S tokens.

    Returns:
        int32 [B, S].

    Raises:
        ValueError: other characters, or rows of different lengths.

    Example:
        >>> tokens_of(["ab" + chr(END)]).tolist()
        [[97, 98, 256]]
    """
    check_instance("rows", rows, (list, tuple), "a list of texts")
    if not rows:
        raise ValueError("rows must hold at least one text, got none")
    for row in rows:
        check_instance("rows", row, str, "a list of texts")
    if any(not row.replace(chr(END), "").isascii() for row in rows):
        raise ValueError("rows must be ASCII, so that a character is one token: encode other texts with the tokenizer")
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"rows must have one length, got {sorted({len(row) for row in rows})}")
    return np.stack([np.frombuffer(row.encode("utf-16-le"), np.uint16) for row in rows]).astype(np.int32)


def write_byte_tokenizer(directory: str | Path, *, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json, as transformers reads them.

    Args:
        directory: of a checkpoint.
        max_length: the model's positions.

    Raises:
        ModuleNotFoundError: the package `tokenizers` is not installed.

    Example:
        >>> import tempfile, tokenizers
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_byte_tokenizer(folder, max_length=1024)
        ...     tokenizer = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")
        >>> tokenizer.encode("a\u00e9").ids
        [97, 195, 169]
    """
    directory = check_path("directory", directory)
    check_count("max_length", max_length, 1)
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # BPE without merges, over the characters by which tokenizers write bytes.
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_TEXT, special=True, normalized=False)])
    assert tokenizer.token_to_id(END_TEXT) == END

    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TEXT,
        "pad_token": END_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    for name, value in (
        ("tokenizer_config", config),
        ("generation_config", {"eos_token_id": END, "pad_token_id": END}),
    ):
        (directory / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def _byte_characters() -> list[str]:
    """The character that stands for each byte: itself where it is printable, else one above U+00FF, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(rest)) for byte in range(BYTES)]
