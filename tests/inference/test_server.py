"""The server speaks OpenAI's API: what it says is what the engine gives."""

import json

import pytest
from starlette.testclient import TestClient

from ring_jax.inference import Engine
from ring_jax.inference.server import make_app
from ring_jax.inference.tokenizer import Tokenizer
from tests.inference.checkpoint import tiny_checkpoint, tiny_model

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
GREEDY = {"model": "tiny", "max_tokens": 5, "temperature": 0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), chat_template=TEMPLATE))


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_model(), rows=2, chunk=64, page=16, pages=40, snapshots=8, decode_steps=4)


@pytest.fixture
def client(engine, tokenizer):
    engine.reset()
    with TestClient(make_app(engine, tokenizer, "tiny")) as client:
        yield client


def answer(engine, tokenizer, ids):
    request = engine.submit(ids, max_new_tokens=5)
    engine.run()
    return request, tokenizer.decode([token for token in request.tokens if token != 256])


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_completions(client, engine, tokenizer):
    request, expected = answer(engine, tokenizer, tokenizer.encode("Once upon"))
    said = client.post("/v1/completions", json=GREEDY | {"prompt": "Once upon", "logprobs": 2}).json()
    (choice,) = said["choices"]
    assert said["object"] == "text_completion" and choice["text"] == expected
    assert choice["logprobs"]["token_logprobs"] == request.log_probabilities
    assert said["usage"]["prompt_tokens_details"]["cached_tokens"] == 8 and said["usage"]["completion_tokens"] == 5
    streamed = client.post("/v1/completions", json=GREEDY | {"prompt": "Once upon", "stream": True})
    assert "".join(event["choices"][0]["text"] for event in events(streamed)) == expected


def test_chat(client, engine, tokenizer):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    _, expected = answer(engine, tokenizer, tokenizer.encode("u:Hello;a:"))
    said = client.post("/v1/chat/completions", json=GREEDY | {"messages": messages}).json()
    assert said["choices"][0]["message"] == {"role": "assistant", "content": expected}
    options = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
    found = events(client.post("/v1/chat/completions", json=GREEDY | options))
    assert found[0]["choices"][0]["delta"]["role"] == "assistant" and found[-1]["usage"]["completion_tokens"] == 5
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in found if e["choices"]) == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt must be text"),
        ({"prompt": "x", "n": 99}, "n must be from 1 to 16"),
        ({"prompt": "x", "temperature": "hot"}, "temperature must be a number"),
        ({"prompt": "x", "tools": [1]}, "tools is not supported"),
        ({"prompt": "x", "stream": "yes"}, "stream must be true or false"),
        ({"prompt": "x" * 600}, "exceed the model's 512"),
        ({"prompt": [999]}, "token id 999"),
    ],
)
def test_errors(client, body, message):
    said = client.post("/v1/completions", json=body)
    assert said.status_code == 400 and message in said.json()["error"]["message"]


def test_models_and_health(client):
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/health").status_code == 200 and client.get("/stats").json()["requests"] == 0
