"""Turns a client's request into jobs for the engine, and the engine's events into answers for the client."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from phi4_mlx.errors import Phi4Error
from phi4_mlx.generation.answer import AnswerAssembler
from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.grammar.apart import Refused
from phi4_mlx.grammar.order import Order
from phi4_mlx.server.apis.body import API_SAMPLING
from phi4_mlx.server.apis.wire import Ask, Call, Delta, End, WireError, new_id
from phi4_mlx.server.engine.protocol import Failure, Finish, Job, Piece
from phi4_mlx.server.engine.supervisor import Full, Supervisor
from phi4_mlx.server.grammar_pool import Busy, GrammarPool
from phi4_mlx.server.media_reader import MediaReader, has_media
from phi4_mlx.server.model_kind import ModelKind
from phi4_mlx.terminal.amount import amount
from phi4_mlx.tokens.overflow import Overflow, keep_latest, split_turns
from phi4_mlx.tokens.prompt import Prompt
from phi4_mlx.tokens.tokenizer import Tokenizer

UNREAD_ITEMS = 16  # of a client's answers; beyond them the supervisor's own limit counts
_FOLDERS = re.compile(r"(?<![\w./:])/(?:[^\s/'\",;:]+/)+")  # of an absolute path; which is not for clients to see


@dataclass(frozen=True)
class Service:
    """The served models and the engine that runs them.

    Attributes:
        supervisor: the engine.
        tokenizer: of the model and all its adapters.
        models: model ids that a client may name -> the adapter's name, None for the model itself.
        vocabulary: number of token ids.
        timeout_s: seconds that an answer may take.
        max_tokens: limit of an answer whose client sets none; None for what the context has room for.
        grammars: makes the grammars of answers.
        kind: of the model and all its adapters.
        sampling: the defaults of temperature and top_p.
        thinks: True separates the thoughts of the model from its answers.
        media: decodes the pictures and sounds of requests; None for a text-only model.
        overflow: for a conversation that does not fit, "stop" refuses it and "oldest" leaves out its oldest turns.
    """

    supervisor: Supervisor
    tokenizer: Tokenizer
    models: Mapping[str, str | None]
    vocabulary: int
    timeout_s: float
    max_tokens: int | None = None
    grammars: GrammarPool = field(default_factory=GrammarPool)
    kind: ModelKind = "instruct"
    overflow: Overflow = "stop"
    sampling: Sampling = API_SAMPLING
    thinks: bool = False
    media: MediaReader | None = None

    def served(self, ask: Ask) -> Ask:
        """The request with the name of the model that answers it.

        The model itself answers a request that names none, and, where there are no adapters, one with any name.

        Raises:
            WireError: the model is not known.
        """
        own = next(iter(self.models))
        if ask.model in self.models:
            return ask
        if not ask.model:
            return replace(ask, model=own)
        if len(self.models) == 1:
            return replace(ask, model=own, ignored=(*ask.ignored, "model"))
        known = ", ".join(self.models)
        raise WireError(404, f"there is no model {ask.model!r:.100}; there are {known}", "model", "model_not_found")

    async def prompts(
        self, ask: Ask, must_fit: bool = True, hold: Callable[[int], None] = lambda size: None
    ) -> tuple[Ask, list[Prompt]]:
        """(the request as it is answered, its prompts as token ids with their media).

        Args:
            ask: the request.
            must_fit: refuses a prompt that leaves no room for an answer.
            hold: counts the bytes of each decoded picture and sound.

        Raises:
            WireError: a prompt or a medium is malformed, or does not fit.
        """
        roll = must_fit and self.overflow == "oldest"
        ask = await self._with_media(ask, None if roll or not must_fit else self.supervisor.longest, hold)
        try:  # in a thread: encoding a long prompt would block other requests
            ask, prompts = await asyncio.to_thread(self._encode, ask, roll)
        except Phi4Error as error:
            raise WireError(400, str(error)) from None
        for prompt in prompts if must_fit else ():
            _check_length(ask, len(prompt), self.supervisor, self.overflow)
        return ask, prompts

    async def _with_media(self, ask: Ask, most_tokens: int | None, hold: Callable[[int], None]) -> Ask:
        """The request with its media decoded, which a model of the client's own adapter does not take."""
        if self.media is None or not has_media(ask.messages):
            return ask
        if self.models[ask.model] is not None:
            raise WireError(400, f"{ask.model!r:.100} is an adapter, which takes no pictures and sounds", "model")
        return replace(ask, messages=await self.media.read(ask.messages, most_tokens, hold))

    async def jobs(self, ask: Ask, prompts: Sequence[Prompt]) -> tuple[list[Job], tuple[str, ...]]:
        """The engine's jobs for a request, one for each answer; and the paths of what has no effect on the answers.

        Raises:
            WireError: the requested grammar cannot be built.
        """
        grammar, loosened = await self.grammar(ask)
        oldest = (amount(ask.dropped, "oldest turn").replace(",", ""),) if ask.dropped else ()
        ignored = (*oldest, *ask.ignored, *loosened)
        jobs = []
        for prompt in prompts:
            room = self.supervisor.longest - len(prompt)
            limit = min(room, ask.max_tokens or self.max_tokens or room)
            if ask.max_tokens and ask.max_tokens > room and "max_tokens" not in ignored:
                ignored = (*ignored, "max_tokens")
            for n in range(ask.n):
                seed = ask.sampling.seed
                sampling = ask.sampling if seed is None else replace(ask.sampling, seed=(seed + n) % 2**64)
                adapter = self.models[ask.model]
                job = Job(0, prompt, limit, sampling, ask.stop, ask.top_logprobs, grammar, adapter, self.timeout_s)
                jobs.append(replace(job, priority=ask.priority))
        return jobs, ignored

    async def grammar(self, ask: Ask) -> tuple[str | None, tuple[str, ...]]:
        """The grammar of an answer, as text, and what it does not enforce; None if the answer is free.

        Raises:
            WireError: it cannot be made, or too many others wait to be made.
        """
        tools = tuple(ask.tools) if _calls_tools(ask) else ()
        if not tools and ask.response_format is None:
            return None, ()
        order = Order(ask.response_format, ask.strict, tools, ask.tool_choice, ask.parallel_tool_calls)
        try:
            grammar = await self.grammars.make(order)
        except Refused as error:
            raise WireError(400, str(error), error.field) from None
        except Busy:
            raise WireError(503, "too many grammars wait to be compiled; send the request again in a moment") from None
        except OSError:
            raise WireError(503, "no process can be started to compile the grammar; try again in a moment") from None
        return grammar.text, grammar.loosened

    async def answers(self, ask: Ask, jobs: list[Job]) -> AsyncGenerator[Delta | End, None]:
        """The items of all answers as they come; closing the generator cancels the jobs.

        Raises:
            WireError: an answer failed, or there are too many jobs.
        """
        queue: asyncio.Queue[Delta | End | WireError] = asyncio.Queue(UNREAD_ITEMS)

        async def listen(index: int, job: Job) -> None:
            try:
                async with contextlib.aclosing(self._answer(ask, index, job)) as items:
                    async for item in items:
                        await queue.put(item)
            except WireError as error:
                await queue.put(error)
            except Exception as error:
                await queue.put(WireError(500, f"the server could not answer: {type(error).__name__}"))

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
        tools = ask.tools if _calls_tools(ask) else ()
        free = ask.response_format is None and ask.tool_choice in ("auto", "none")
        thinks = self.thinks and free and bool(ask.messages)
        answer = AnswerAssembler(tools, marked=ask.response_format is not None, thinks=thinks)
        sent_calls = 0
        try:
            async with contextlib.aclosing(self.supervisor.events(job)) as events:
                async for event in events:
                    if isinstance(event, Failure):
                        raise WireError(event.status, _FOLDERS.sub(".../", event.message))
                    if isinstance(event, Piece):
                        text, logprobs = answer.add(event.text, forced=event.forced), event.logprobs
                    else:
                        by_stop_string = event.stop_string is not None
                        text, logprobs = answer.add("", event.reason, by_stop_string=by_stop_string), ()
                    if (thought := answer.new_thought()) or text or logprobs:
                        yield Delta(index, text, None, logprobs, thought)
                    for call in answer.calls[sent_calls:]:
                        yield Delta(index, "", Call(new_id("call_"), call.name, call.arguments))
                    sent_calls = len(answer.calls)
                    if isinstance(event, Finish):
                        reason = "tool_calls" if sent_calls and event.reason == "stop" else event.reason
                        counts = event.prompt_tokens, event.cached_tokens, event.answer_tokens
                        yield End(index, reason, event.stop_string, *counts)
        except Full:
            raise WireError(429, "the server is full; send the request again in a moment") from None

    def _encode(self, ask: Ask, roll: bool) -> tuple[Ask, list[Prompt]]:
        """(the request as it is answered, its prompts); with `roll`, without the turns that do not fit."""
        tokenizer, tools = self.tokenizer, ask.tools if _calls_tools(ask) else None
        if not ask.messages:
            return ask, [Prompt(tokenizer.encode(each) if isinstance(each, str) else each) for each in ask.prompts]
        if not roll:
            return ask, [tokenizer.apply_chat_template(ask.messages, tools)]
        head, turns = split_turns(ask.messages)
        prompt, dropped = keep_latest(
            turns,
            lambda kept: tokenizer.apply_chat_template([*head, *chain.from_iterable(kept)], tools),
            lambda turn: tokenizer.chat_format.length(tokenizer, turn),
            self.supervisor.longest,
            ask.max_tokens or self.max_tokens,
        )
        return replace(ask, dropped=dropped), [prompt]


def _calls_tools(ask: Ask) -> bool:
    return bool(ask.tools) and ask.tool_choice != "none"


def _check_length(ask: Ask, length: int, supervisor: Supervisor, overflow: Overflow) -> None:
    longest = supervisor.longest
    if not length:
        raise WireError(400, "the prompt has 0 tokens; it needs at least 1", "prompt")
    if length >= longest:
        message = (  # some clients look for its first words
            f"prompt is too long: {length} tokens > {longest - 1} maximum; this server holds {longest} with answer"
            f"{supervisor.note}"
        )
        if ask.dropped:
            message += f"; {amount(ask.dropped, 'oldest turn')} left out already"
        elif overflow == "stop" and len(split_turns(ask.messages)[1]) > 1:
            message += "; started with --context-overflow oldest, it would leave out the oldest turns"
        raise WireError(400, message, "messages", "context_length_exceeded")
