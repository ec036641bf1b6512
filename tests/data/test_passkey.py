"""Pass-key texts and the byte tokenizer."""

import json

import numpy as np
import pytest

from ring_jax.data.byte_tokenizer import END, END_TEXT, tokens_of, write_byte_tokenizer
from ring_jax.data.passkey import NEEDLE, QUESTION, held_out_text, pass_key_text, random_text, training_row


@pytest.mark.parametrize("length", [79, 80, 500, 16384])
@pytest.mark.parametrize("depth", [0.0, 0.31, 1.0])
def test_key_lies_where_it_should(length, depth):
    found = pass_key_text("00712", length, depth)
    needle = NEEDLE.format(key="00712")
    assert len(found.prompt) == length and found.prompt.isascii()
    assert found.prompt.count("00712") == 1 and found.prompt.count(needle) == 1
    assert found.prompt.endswith(QUESTION) and found.answer == "00712."
    room = length - len(needle) - len(QUESTION)
    place = found.prompt.index(needle)
    assert place <= round(depth * room)
    assert place >= depth * room - 200  # the space before, at most a line of dashes away
    rest = found.prompt.replace(needle, "").removesuffix(QUESTION)
    assert (held_out_text() * 2).startswith(rest)


def test_texts_repeat_and_differ():
    first, again = (random_text(np.random.default_rng(7), 300, text="a b c ") for _ in range(2))
    assert first == again
    assert random_text(np.random.default_rng(8), 300, text="a b c ").key != first.key


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("12345", 50, 0.5), "length must be at least 79"),
        (("12345", 500, 1.5), "depth must be finite and >= 0 and <= 1, got 1.5"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_key_text(*arguments)


def test_text_must_be_ascii():
    with pytest.raises(ValueError, match="one byte"):
        pass_key_text("12345", 500, 0.5, text="\u00e9" * 10)


def test_training_rows_ask_behind_the_key():
    asked = set()
    for seed in range(200):
        random = np.random.default_rng(seed)
        length = int(random.integers(230, 400))
        row, answers = training_row(random, length, 4, text="so many words ", end="$")
        key = row[answers[-1] : answers[-1] + 5]
        assert len(row) == length and row.endswith(f"{key}.$")
        assert row.count(key) == len(answers) + 1  # the needle and every answer
        for place in answers:
            assert row[:place].endswith(QUESTION) and row[place : place + 7] == f"{key}.$"
            assert place > row.index(NEEDLE.format(key=key))
        asked.add(len(answers))
    assert asked == {1, 2, 3, 4}


def test_rows_become_tokens():
    tokens = tokens_of(["a\nb" + chr(END), "wxyz"])
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[97, 10, 98, END], [119, 120, 121, 122]]
    with pytest.raises(ValueError, match="must be ASCII"):
        tokens_of(["\u00e9"])
    with pytest.raises(ValueError, match=r"one length, got \[1, 2\]"):
        tokens_of(["a", "ab"])


def test_tokens_are_bytes(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    write_byte_tokenizer(tmp_path, max_length=64)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = bytes(range(128)).decode() + " \u00e9\u00ff\u00ad\u65e5\U0001f600\n\n  end "
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text + END_TEXT).ids == [*ids, END]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == END
