"""Jobs of the demo, and an engine's events for them."""

from __future__ import annotations

from collections.abc import Callable

from phi4_mlx.generation.sampling import Sampling
from phi4_mlx.generation.stream import generate
from phi4_mlx.server.engine.engine import Engine
from phi4_mlx.server.engine.loop import turn
from phi4_mlx.server.engine.protocol import Event, Failure, Finish, Job, Piece
from phi4_mlx.tokens.tokenizer import Tokenizer
from tests.conftest import Demo

GREEDY = Sampling(temp=0.0)
MakeEngine = Callable[..., Engine]


def prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.apply_chat_template([{"role": "user", "content": text}]))


def run(engine: Engine, *jobs: Job, each_step: Callable[[int], None] = lambda step: None) -> dict[int, list[Event]]:
    """The events of each job, as the engine's process would send them."""
    events: dict[int, list[Event]] = {job.id: [] for job in jobs}
    messages: list[Job] = list(jobs)
    for step in range(3000):
        for event in turn(engine, messages):
            events[event.job].append(event)
        messages = []
        each_step(step)
        if not engine.busy:
            return events
    raise AssertionError("the engine does not finish")


def run_to_the_end(engine: Engine) -> list[Event]:
    """The remaining events of all running jobs."""
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def text(events: list[Event]) -> str:
    """The answer of a job that has finished."""
    assert isinstance(events[-1], Finish), events[-1]
    assert not any(isinstance(event, (Finish, Failure)) for event in events[:-1])  # a job ends once
    return "".join(event.text for event in events if isinstance(event, Piece))


def finish(events: list[Event]) -> Finish:
    assert isinstance(events[-1], Finish), events[-1]
    return events[-1]


ANSWERS: dict[tuple[tuple[int, ...], int], str] = {}


def alone(demo: Demo, job: Job) -> str:
    """The greedy answer of `generate`, computed once per prompt and limit."""
    key = job.prompt, job.max_tokens
    if key not in ANSWERS:
        ANSWERS[key] = generate(*demo, job.prompt, max_tokens=job.max_tokens)
    return ANSWERS[key]


QUESTIONS = [
    "What is the capital of France?",
    "Say hello.",
    "Convert 5 km to miles. " * 20,  # 243 tokens; the RoPE boundary is at 256
    "What is 3 plus 4?",
    "Tell me about the sea, please, and do not stop.",
]


def greedy_jobs(tokenizer: Tokenizer, max_tokens: int = 40) -> list[Job]:
    return [Job(n + 1, prompt(tokenizer, each), max_tokens, GREEDY) for n, each in enumerate(QUESTIONS)]
