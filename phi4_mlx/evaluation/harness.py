"""lm-eval's model interface over the batch; needs the extra `eval`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import RequestError
from phi4_mlx.evaluation.answers import Answers
from phi4_mlx.evaluation.asking import Question, ask
from phi4_mlx.evaluation.scoring import scores
from phi4_mlx.evaluation.subject import Progress, Subject
from phi4_mlx.generation.answer_batch import Answer
from phi4_mlx.tokens.prefix import shared_length

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise RequestError(f"evaluation needs lm-eval ({error}); pip install 'lm-eval>=0.4.13'") from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Pair = tuple[list[int], list[int]]

# Settings of a task that an answer depends on; those of one row are other names of one.
_USED = {
    "until", "do_sample", "temperature", "top_p",
    "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens",
}  # fmt: skip


class Harness(TemplateLM):
    """A subject as lm-eval asks it.

    Texts are read as Hugging Face reads them: control strings in them are control tokens. Those in the messages of a
    chat stay text.

    Args:
        subject: the model.
        answers: where scores and answers are kept; see `scores` and `ask`.
        seed: of sampled answers; a question that is repeated takes the seeds that follow.
        max_tokens: the most tokens of an answer, in place of the task's; None for the task's.
        temp: temperature, in place of the task's.
        top_p: probability mass to keep, in place of the task's.
        progress: called with (done, in all).

    Attributes:
        drawn: the questions of `generate_until` with their answers, in lm-eval's order; the reasoning is kept here
            alone.
    """

    def __init__(
        self,
        subject: Subject,
        answers: Answers,
        *,
        seed: int = 0,
        max_tokens: int | None = None,
        temp: float | None = None,
        top_p: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._subject, self._answers, self._progress = subject, answers, progress
        self._seed, self._max_tokens, self._temp, self._top_p = seed, max_tokens, temp, top_p
        self._encode = lru_cache(maxsize=64)(lambda text: tuple(subject.tokenizer.encode(text, specials=True)))
        self._rendered: dict[str, list[int]] = {}
        self.drawn: list[tuple[Instance, Answer]] = []

    @property
    def eot_token_id(self) -> int:
        """A token that ends a turn, or else the one that begins a text."""
        return min(self._subject.tokenizer.eos_ids, default=self._subject.start_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a text, in place of an empty context."""
        return self._subject.start_id

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return self._subject.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The name of the chat format, for the record; the format itself is not a template.

        Raises:
            RequestError: the model has no chat format.
        """
        return self._chat_format.name if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders messages as text; without `add_generation_prompt` the last one is left open for more text.

        Raises:
            RequestError: the model has no chat format, or it does not support a message.
        """
        tokenizer = self._subject.tokenizer
        render = self._chat_format.render if add_generation_prompt else self._chat_format.render_open
        ids = render(tokenizer, chat_history)
        text: str = tokenizer.decode(ids)
        if self.tok_encode(text) != ids:  # a message has a control string, which must stay text
            self._rendered[text] = [*ids]
        return text

    @property
    def _chat_format(self) -> Any:
        chat_format = getattr(self._subject.tokenizer, "chat_format", None)
        if chat_format is None:
            raise RequestError(f"{self._subject.name} has no chat format; --no-apply-chat-template asks in plain text")
        return chat_format

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encodes a text, control strings as control tokens, except those in messages that were rendered."""
        begun = max((text for text in self._rendered if string.startswith(text)), key=len, default="")
        added = len(self._encode("")) if begun else 0  # a start token, which some tokenizers put before any text
        return [*self._rendered.get(begun, ()), *self._encode(string[len(begun) :])[added:]]

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `TemplateLM.loglikelihood`."""
        return self._scores([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `LM.loglikelihood_rolling`: each text after the token that begins a text, in windows."""
        return [logprob for logprob, _ in self._scores([self._pair("", *request.args) for request in requests])]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def _scores(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        found = scores(self._subject, pairs, self._answers, self._progress)
        return [(score.logprob, score.greedy) for score in found]

    def _pair(self, context: str, continuation: str) -> Pair:
        """The ids of a context and a continuation, split as lm-eval splits them."""
        if not context:
            ids, start = self.tok_encode(continuation), self.prefix_token_id
            return [start], ids[1:] if ids[:1] == [start] else ids
        before, after = self._encode_pair(context, continuation)
        if continuation and not after:  # one token reaches over the border: it belongs to the continuation
            whole = self.tok_encode(context + continuation)
            border = shared_length(before, whole)
            before, after = whole[:border], whole[border:]
        return before, after

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM.generate_until`; an answer is without its reasoning."""
        times: Counter[str] = Counter()
        questions = []
        unused: set[str] = set()
        for request in requests:
            context, settings = request.args
            unused |= settings.keys() - _USED
            repeat = repr((context, settings))
            questions.append(self._question(context, settings, self._seed + times[repeat]))
            times[repeat] += 1
        if unused:
            warnings.warn(f"settings of the task that have no effect: {', '.join(sorted(unused))}", stacklevel=2)
        found = ask(self._subject, questions, self._answers, self._progress)
        self.drawn += zip(requests, found, strict=True)
        return [answer.content for answer in found]

    def _question(self, context: str, given: Mapping[str, Any], seed: int) -> Question:
        """A question with a task's settings, or those that take their place."""
        until = given.get("until") or ()
        stops = [until] if isinstance(until, str) else until
        settings = {key: value for key, value in given.items() if value is not None}
        if settings.get("do_sample"):
            settings = {"temperature": 1.0, **settings}  # Hugging Face's default
        settings = normalize_gen_kwargs(settings)
        temp = settings.get("temperature", 0.0)
        return Question(
            name=f"{context[-40:]!r}",
            prompt=self.tok_encode(context),
            max_tokens=self._max_tokens or settings["max_gen_toks"],
            stops=tuple(dict.fromkeys(stop for stop in stops if stop)),
            temp=temp if self._temp is None else self._temp,
            top_p=settings.get("top_p", 1.0) if self._top_p is None else self._top_p,
            seed=seed,
        )
