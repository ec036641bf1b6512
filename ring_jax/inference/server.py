"""The engine behind OpenAI's completions and chat API: what existing clients speak.

    GET  /v1/models                 POST /v1/completions           GET /health
    GET  /stats                     POST /v1/chat/completions      (with streaming, as server-sent events)

Beside OpenAI's fields a request may carry `top_k`, `stop_token_ids`, `cache_salt` and `checkpoints`. `usage` says how many tokens of the
prompt were cached.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ring_jax.inference.engine import Engine
from ring_jax.inference.requests import Request
from ring_jax.inference.sampling import Sampling
from ring_jax.inference.tokenizer import StopAt, TextStream, Tokenizer

_MOST_CHOICES = 16


def make_app(engine: Engine, tokenizer: Tokenizer, name: str) -> Starlette:
    """The ASGI application; `name` is what clients call the model."""
    server = _Server(engine, tokenizer, name)
    return Starlette(
        routes=[
            Route("/health", server.health),
            Route("/stats", server.stats),
            Route("/v1/models", server.models),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
        ]
    )


class _Refused(ValueError):
    """What a client can put right: 400, with its message."""


@dataclasses.dataclass
class _Choice:
    """One of the texts that answer a request, as it is written."""

    index: int
    request: Request
    text: StopAt
    finish: str | None = None


class _Server:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str):
        self._engine, self._tokenizer, self._name = engine, tokenizer, name
        self._began = int(time.time())

    async def health(self, http: HttpRequest) -> Response:
        return Response(status_code=200)

    async def stats(self, http: HttpRequest) -> Response:
        return JSONResponse(dataclasses.asdict(self._engine.stats()))

    async def models(self, http: HttpRequest) -> Response:
        entry = {"id": self._name, "object": "model", "created": self._began, "owned_by": "ring_jax"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def completions(self, http: HttpRequest) -> Response:
        return await self._answer(http, chat=False)

    async def chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, chat=True)

    async def _answer(self, http: HttpRequest, *, chat: bool) -> Response:
        try:
            body = await http.json()
            if not isinstance(body, dict):
                raise _Refused("the body must be a JSON object")
            prompts = self._prompts(body, chat)
            stream, logged = (
                _flag(body, "stream"),
                _flag(body, "logprobs") if chat else body.get("logprobs") is not None,
            )
            choices = self._submit(body, prompts, chat)
        except (ValueError, TypeError) as error:  # json's own is a ValueError too
            return _error(400, "invalid_request_error", str(error))
        except RuntimeError as error:
            return _error(500, "server_error", str(error))
        form = _Form(self._name, chat, logged)
        if stream:
            with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            events = self._events(form, choices, with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            await asyncio.gather(*(self._finish(choice) for choice in choices))
        except RuntimeError as error:
            return _error(500, "server_error", str(error))
        finally:
            _cancel(choices)
        return JSONResponse(form.whole(choices, self._tokenizer))

    def _prompts(self, body: Mapping[str, Any], chat: bool) -> list[list[int]]:
        if chat:
            return [self._tokenizer.conversation(_messages(body.get("messages")))]
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            return [self._tokenizer.encode(prompt)]
        if isinstance(prompt, list) and prompt and all(isinstance(each, str) for each in prompt):
            return [self._tokenizer.encode(each) for each in prompt]
        if isinstance(prompt, list) and prompt and all(isinstance(each, list) for each in prompt):
            return prompt
        if isinstance(prompt, list):
            return [prompt]
        raise _Refused("prompt must be text, a list of texts, or token ids")

    def _submit(self, body: Mapping[str, Any], prompts: list[list[int]], chat: bool) -> list[_Choice]:
        for field in ("echo", "suffix", "best_of", "tools", "functions", "logit_bias"):
            if body.get(field):
                raise _Refused(f"{field} is not supported")
        count = _number(body, "n", 1, kind=int)
        if not 1 <= count <= _MOST_CHOICES:
            raise _Refused(f"n must be from 1 to {_MOST_CHOICES}, got {count}")
        stops = body.get("stop") or []
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise _Refused("stop must be a text or a list of texts")
        seed = _number(body, "seed", None, kind=int)
        seed = uuid.uuid4().int >> 66 if seed is None else seed
        options = self._options(body, chat)
        choices: list[_Choice] = []
        for prompt in prompts:
            for _ in range(count):
                request = self._engine.submit(prompt, seed=seed + len(choices), **options)
                choices.append(_Choice(len(choices), request, StopAt(TextStream(self._tokenizer), stops)))
        return choices

    def _options(self, body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
        most = _number(
            body, "max_completion_tokens", _number(body, "max_tokens", 512 if chat else 16, kind=int), kind=int
        )
        sampling = Sampling(
            _number(body, "temperature", 1.0), _number(body, "top_k", None, kind=int), _number(body, "top_p", 1.0)
        )
        top = _number(body, "top_logprobs" if chat else "logprobs", 0, kind=int)
        return {
            "max_new_tokens": most,
            "sampling": sampling,
            "stop_ids": body.get("stop_token_ids"),
            "top_log_probabilities": top,
            "salt": body.get("cache_salt") or "",
            "checkpoints": tuple(body.get("checkpoints") or ()),
        }

    async def _finish(self, choice: _Choice) -> None:
        async for _ in self._pieces(choice):
            pass

    async def _pieces(self, choice: _Choice) -> AsyncIterator[tuple[str, int]]:
        """(text that is certain, how many tokens there are by then), until the choice has ended."""
        request, ends = choice.request, set(self._engine.config.eos_token_ids)
        async for token in request:
            piece = "" if token in ends else choice.text.add(token)
            if piece:
                yield piece, len(request.tokens)
            if choice.text.stopped:
                choice.finish = "stop"
                request.cancel()
                return
        last = choice.text.finish()
        if last:
            yield last, len(request.tokens)
        choice.finish = request.finish_reason

    async def _events(self, form: _Form, choices: list[_Choice], with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events, of all choices as they come."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def write(choice: _Choice) -> None:
            seen = 0
            async for piece, tokens in self._pieces(choice):
                await queue.put(form.piece(choice, piece, range(seen, tokens), self._tokenizer))
                seen = tokens
            await queue.put(form.piece(choice, "", range(0), self._tokenizer, finish=choice.finish))

        async def write_all() -> None:
            try:
                await asyncio.gather(*map(write, choices))
            except RuntimeError as error:
                await queue.put({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
            await queue.put(None)

        task = asyncio.create_task(write_all())
        try:
            if form.chat:
                for choice in choices:
                    yield _event(form.piece(choice, "", range(0), self._tokenizer, role="assistant"))
            while (event := await queue.get()) is not None:
                yield _event(event)
            if with_usage:
                yield _event(form.head() | {"choices": [], "usage": _usage(choices)})
            yield "data: [DONE]\n\n"
        finally:  # also where the client has gone
            _cancel(choices)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@dataclasses.dataclass
class _Form:
    """How answers are written down: as completions or as chat."""

    name: str
    chat: bool
    log_probabilities: bool
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def head(self, chunk: bool = True) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        return {"id": prefix + self.id, "object": kind, "created": self.created, "model": self.name}

    def piece(
        self,
        choice: _Choice,
        text: str,
        tokens: range,
        tokenizer: Any,
        *,
        finish: str | None = None,
        role: str | None = None,
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {"index": choice.index, "finish_reason": finish}
        if self.chat:
            entry["delta"] = {} if finish else {"content": text} | ({"role": role} if role else {})
        else:
            entry["text"] = text
        if self.log_probabilities and len(tokens):
            entry["logprobs"] = self._logprobs(choice, tokens, tokenizer)
        return self.head() | {"choices": [entry]}

    def whole(self, choices: list[_Choice], tokenizer: Any) -> dict[str, Any]:
        entries = []
        for choice in choices:
            text = choice.text.text
            entry: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish}
            entry |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            every = range(len(choice.request.tokens))
            entry["logprobs"] = self._logprobs(choice, every, tokenizer) if self.log_probabilities else None
            entries.append(entry)
        return self.head(chunk=False) | {"choices": entries, "usage": _usage(choices)}

    def _logprobs(self, choice: _Choice, tokens: range, tokenizer: Any) -> dict[str, Any]:
        request = choice.request
        said = {n: tokenizer.decode([request.tokens[n]]) for n in tokens}
        top = {n: [(tokenizer.decode([t]), p) for t, p in request.top[n]] if request.top else [] for n in tokens}
        if not self.chat:
            values = [request.log_probabilities[n] for n in tokens]
            return {
                "tokens": list(said.values()),
                "token_logprobs": values,
                "top_logprobs": [dict(top[n]) for n in tokens],
            }

        def one(text: str, value: float) -> dict[str, Any]:
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return {
            "content": [
                one(said[n], request.log_probabilities[n]) | {"top_logprobs": [one(*pair) for pair in top[n]]}
                for n in tokens
            ]
        }


def _usage(choices: list[_Choice]) -> dict[str, Any]:
    prompt = sum(choice.request.prompt_tokens for choice in choices)
    new = sum(len(choice.request.tokens) for choice in choices)
    cached = sum(choice.request.hit_tokens or 0 for choice in choices)
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return usage | {"prompt_tokens_details": {"cached_tokens": cached}}


def _cancel(choices: list[_Choice]) -> None:
    for choice in choices:
        if not choice.request.done:
            choice.request.cancel()


def _messages(messages: Any) -> list[dict[str, str]]:
    """Messages whose contents are text, or parts of text."""
    if not isinstance(messages, list) or not messages:
        raise _Refused("messages must be a list of messages")
    found = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise _Refused("only parts of type text are supported")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise _Refused("every message needs a role and a content of text")
        found.append({"role": message.get("role"), "content": content})
    return found


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _Refused(f"{name} must be true or false")
    return bool(value)


def _number(body: Mapping[str, Any], name: str, default: Any, kind: type = float) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise _Refused(f"{name} must be {'an integer' if kind is int else 'a number'}")
    return value


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _error(status: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status_code=status)
