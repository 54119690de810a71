"""From what a client asks to what the engine is given, and from the engine's events to what the client is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace

from phi4_mlx.errors import Phi4Error
from phi4_mlx.server.apis.wire import Ask, Call, Delta, End, WireError, new_id
from phi4_mlx.server.engine.protocol import Failure, Finish, Job, Piece
from phi4_mlx.server.engine.supervisor import Full, Supervisor
from phi4_mlx.tokens.tokenizer import Tokenizer
from phi4_mlx.tools.parser import ToolCallParser


@dataclass(frozen=True)
class Service:
    """What is served, and by which engine.

    Attributes:
        supervisor: the engine.
        tokenizer: of the model and all its adapters.
        models: the ids that a client may name -> the adapter that each means, None for the model itself.
        vocabulary: how many token ids there are.
        timeout_s: how long an answer may take.
        max_tokens: the longest answer where a client sets no limit; None for as long as fits.
    """

    supervisor: Supervisor
    tokenizer: Tokenizer
    models: Mapping[str, str | None]
    vocabulary: int
    timeout_s: float
    max_tokens: int | None = None

    async def prompts(self, ask: Ask) -> list[list[int]]:
        """The prompts of a request as token ids.

        Raises:
            WireError: the model has no such name, a prompt is malformed or too long.
        """
        if ask.model not in self.models:
            known = ", ".join(self.models)
            raise WireError(404, f"there is no model {ask.model!r:.100}; there are {known}", "model", "model_not_found")
        try:
            prompts = await asyncio.to_thread(self._encode, ask)  # a long one would keep the others waiting
        except Phi4Error as error:
            raise WireError(400, str(error)) from None
        for prompt in prompts:
            self._check_length(len(prompt), ask.max_tokens)
        return prompts

    async def jobs(self, ask: Ask, prompts: list[list[int]]) -> list[Job]:
        """The engine's share of a request: a job for each answer.

        Raises:
            WireError: the grammar that it asks for cannot be made.
        """
        grammar = await asyncio.to_thread(_grammar, ask)
        jobs = []
        for prompt in prompts:
            room = self.supervisor.longest - len(prompt)
            limit = ask.max_tokens or min(room, self.max_tokens or room)
            for n in range(ask.n):
                seed = ask.sampling.seed
                sampling = ask.sampling if seed is None else replace(ask.sampling, seed=(seed + n) % 2**64)
                adapter = self.models[ask.model]
                jobs.append(
                    Job(0, tuple(prompt), limit, sampling, ask.stop, ask.top_logprobs, grammar, adapter, self.timeout_s)
                )
        return jobs

    async def answers(self, ask: Ask, jobs: list[Job]) -> AsyncGenerator[Delta | End, None]:
        """What the client is told, all answers among one another; whoever stops listening cancels them.

        Raises:
            WireError: an answer failed, or there are too many jobs.
        """
        queue: asyncio.Queue[Delta | End | WireError] = asyncio.Queue()

        async def listen(index: int, job: Job) -> None:
            try:
                async with contextlib.aclosing(self._answer(ask, index, job)) as items:
                    async for item in items:
                        queue.put_nowait(item)
            except WireError as error:
                queue.put_nowait(error)
            except Exception as error:
                queue.put_nowait(WireError(500, f"the server could not answer: {type(error).__name__}"))

        tasks = [asyncio.create_task(listen(index, job)) for index, job in enumerate(jobs)]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, WireError):
                    raise item
                left -= isinstance(item, End)
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, ask: Ask, index: int, job: Job) -> AsyncGenerator[Delta | End, None]:
        calling = _calls_tools(ask)
        parser = ToolCallParser(ask.tools if calling else [], marked=ask.response_format is not None)
        told = 0  # calls

        def delta(text: str, piece: Piece | None) -> list[Delta]:
            nonlocal told
            new, told = parser.calls[told:], len(parser.calls)
            logprobs = piece.logprobs if piece else ()
            items = [Delta(index, text, None, logprobs)] if text or logprobs else []
            return items + [Delta(index, "", Call(new_id("call_"), call.name, call.arguments)) for call in new]

        try:
            async with contextlib.aclosing(self.supervisor.events(job)) as events:
                async for event in events:
                    if isinstance(event, Piece):
                        for item in delta(parser.add(event.text), event):
                            yield item
                    elif isinstance(event, Finish):
                        for item in delta(parser.finish(), None):
                            yield item
                        reason = "tool_calls" if told and event.reason == "stop" else event.reason
                        counts = event.prompt_tokens, event.cached_tokens, event.answer_tokens
                        yield End(index, reason, event.stop_string, *counts)
                    elif isinstance(event, Failure):
                        raise WireError(event.status, event.message)
        except Full:
            raise WireError(429, "the server has as many requests as it takes; ask again in a moment") from None

    def _encode(self, ask: Ask) -> list[list[int]]:
        if not ask.messages:
            return [self.tokenizer.encode(each) if isinstance(each, str) else each for each in ask.prompts]
        tools = ask.tools if _calls_tools(ask) else None
        return [self.tokenizer.apply_chat_template(ask.messages, tools=tools)]

    def _check_length(self, length: int, max_tokens: int | None) -> None:
        longest = self.supervisor.longest
        if not length:
            raise WireError(400, "the prompt has 0 tokens; it needs at least 1", "prompt")
        if length + (max_tokens or 1) > longest:
            wanted = f"{length} prompt tokens and max_tokens {max_tokens}" if max_tokens else f"{length} prompt tokens"
            message = f"{wanted} are more than the {longest} that this server can hold; shorten one or the other"
            raise WireError(400, message, "messages", "context_length_exceeded")


def _calls_tools(ask: Ask) -> bool:
    return bool(ask.tools) and ask.tool_choice != "none"


def _grammar(ask: Ask) -> str | None:
    """What an answer must obey, as text.

    Raises:
        WireError: it cannot be made.
    """
    if not _calls_tools(ask) and ask.response_format is None:
        return None

    from phi4_mlx.grammar import grammars as constrain  # late: its library is loaded only for those who ask for it

    makers: dict[str, Callable[..., constrain.Grammar]] = {
        "json_object": constrain.json_object,
        "json_schema": constrain.json_schema,
        "regex": constrain.regex,
        "choice": constrain.choice,
        "grammar": constrain.lark,
    }
    grammar: constrain.Grammar | None = None
    field = "response_format"
    try:
        if ask.response_format is not None:
            kind, *given = ask.response_format
            grammar = makers[kind](*given)
        if _calls_tools(ask):
            field = "tools"
            grammar = constrain.tool_calls(ask.tools, ask.tool_choice, ask.parallel_tool_calls, grammar)
    except Phi4Error as error:
        raise WireError(400, str(error), field) from None
    return None if grammar is None else grammar.text
