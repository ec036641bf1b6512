"""Tokenizers of checkpoint directories, chat templates, and text that streams out."""

import json

import pytest

from ring_jax.commands.generate import StopAt
from ring_jax.inference.tokenizer import TextStream, Tokenizer
from tests.inference.checkpoint import EOS, tiny_checkpoint

TEMPLATE = """{%- for message in messages %}
[{{ message.role }}] {{ message.content }}
{% endfor %}
{%- if add_generation_prompt %}[assistant] {% endif %}{% if messages[0].content == "bad" %}{{ raise_exception("no") }}{% endif %}"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), chat_template=TEMPLATE)


def test_round_trip_and_end_of_text(directory):
    tokenizer = Tokenizer(directory)
    text = "naïve 数 🙂\n\ttabs"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and tokenizer.decode([*ids, EOS]) == text
    assert tokenizer.eos_token_ids == (EOS,)


def test_chat_template(directory):
    tokenizer = Tokenizer(directory)
    assert tokenizer.decode(tokenizer.chat("hello")) == "[user] hello\n[assistant] "
    with pytest.raises(ValueError, match="chat template failed: no"):
        tokenizer.chat("bad")


def test_ids_that_end_a_text_come_from_every_file(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == (7, 9, EOS)
    assert tokenizer.decode(tokenizer.chat("hi")) == "hi!"


def test_stream_holds_back_half_a_character(directory):
    tokenizer = Tokenizer(directory)
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode("a🙂b")]
    assert pieces == ["a", "", "", "", "🙂", "b"] and stream.text == "a🙂b"
    stream.add(tokenizer.encode("🙂")[0])
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (("END",), "one END two", "one "),
        (("END",), "E EN ENDING", "E EN "),
        (("END",), "never EN", "never EN"),
        (("ab", "b"), "xab", "x"),
        ((), "all of it", "all of it"),
    ],
)
def test_stop_texts_never_show(directory, stops, text, shown):
    tokenizer = Tokenizer(directory)
    stream, out = StopAt(TextStream(tokenizer), stops), ""
    for token in tokenizer.encode(text):
        out += stream.add(token)
        assert shown.startswith(out)
        if stream.stopped:
            break
    assert out + stream.finish() == shown == stream.text


def test_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        Tokenizer(tmp_path)
