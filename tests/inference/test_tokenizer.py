"""Tokenizers of checkpoint directories, chat templates, and text that streams out."""

import json
import time

import pytest

from ring_jax.inference import tokenizer as tokenizer_module
from ring_jax.inference.tokenizer import StopAt, TextStream, Tokenizer
from ring_jax.models.qwen3_5 import Qwen3_5
from tests.inference.checkpoint import EOS, tiny_checkpoint, tiny_model

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


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{% for x in %}", "Expected an expression"),
        ("{{ messages.nothing.more }}", "has no attribute 'nothing'"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "maximum recursion depth"),
        # Growing without end: as memory, in one operation and step by step, and as text.
        ("{{ 'a' * 10**10 }}", "more than 1,024 MiB"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "more than 1,024 MiB",
        ),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}a loop{% endfor %}{% endfor %}",
            "more than 1,0.* characters",
        ),
        # Running without end.
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 seconds"),
    ],
)
def test_a_template_has_limits(directory, monkeypatch, template, match):
    monkeypatch.setattr(tokenizer_module, "TEMPLATE_SECONDS", 1.0 if "1 seconds" in match else 60.0)
    tokenizer = Tokenizer(directory)
    tokenizer.chat_template = template
    begin = time.monotonic()
    with pytest.raises(ValueError, match=f"the chat template failed: .*{match}"):
        tokenizer.chat("hello")
    assert time.monotonic() - begin < 30


def test_a_long_text_is_within_the_limits(directory):
    tokenizer = Tokenizer(directory)
    text = "naïve " * 50_000
    assert tokenizer.decode(tokenizer.chat(text)) == f"[user] {text}\n[assistant] "


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("tokenizer.json", "[]", "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", '{"model": null}', "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json must be a JSON object, got \[\]"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[" * 10**5, "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", '{"eos_token": 3}', "tokenizer_config.json: eos_token must be text, got 3"),
        ("tokenizer_config.json", '{"pad_token": {"content": []}}', r"pad_token: content must be text, got \[\]"),
        ("tokenizer_config.json", '{"chat_template": 3}', "tokenizer_config.json: chat_template must be text, got 3"),
        ("tokenizer_config.json", '{"chat_template": ["a"]}', r"chat_template\[0\] must be a JSON object, got 'a'"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {}}, "eos_token": "a"}',
            "token ids must be integers",
        ),
        ("generation_config.json", '{"eos_token_id": "a"}', "generation_config.json: eos_token_id must be an integer"),
        ("generation_config.json", "null", "generation_config.json must be a JSON object, got None"),
        ("config.json", '{"eos_token_id": -1}', "config.json: eos_token_id must be >= 0, got -1"),
        ("config.json", '{"text_config": [1]}', "config.json: text_config must be a JSON object"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is not valid JSON"),
    ],
)
def test_broken_files_are_named(directory, tmp_path, file, text, match):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=match):
        Tokenizer(tmp_path)


def test_what_is_no_text(directory):
    tokenizer = Tokenizer(directory)
    for bad in (3, None, b"abc", ["a"]):
        with pytest.raises(TypeError, match="text must be text"):
            tokenizer.encode(bad)
        with pytest.raises(TypeError, match="text must be text"):
            tokenizer.chat(bad)
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        tokenizer.encode("\ud800")
    for bad in ("abc", 3, [1.5], [None]):
        with pytest.raises(TypeError, match="token id"):
            tokenizer.decode(bad)
    with pytest.raises(ValueError, match="a token id must be in"):
        tokenizer.decode([-1])


def test_a_model_with_its_tokenizer_saves_one_that_works(directory, tmp_path):
    Qwen3_5.from_pretrained(directory).save_pretrained(tmp_path / "a")
    again, tokenizer = Tokenizer(tmp_path / "a"), Tokenizer(directory)
    assert again.chat("hello") == tokenizer.chat("hello") and again.eos_token_ids == tokenizer.eos_token_ids
    # One that was made here is given it by name.
    tiny_model().save_pretrained(tmp_path / "b", tokenizer_from=directory)
    assert Tokenizer(tmp_path / "b").encode("hello") == tokenizer.encode("hello")


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
