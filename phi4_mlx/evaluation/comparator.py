"""Comparators: models of other families on lm-eval's tasks, run by mlx-lm, with answers kept as ours are."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi4_mlx.checkpoint import KINDS
from phi4_mlx.errors import Phi4Error, RequestError, message_of
from phi4_mlx.evaluation.answers import Answers, key_of
from phi4_mlx.evaluation.asking import Answer
from phi4_mlx.evaluation.lm_tasks import quieten
from phi4_mlx.evaluation.options import Options
from phi4_mlx.evaluation.subject import Subject, load_subject
from phi4_mlx.files.json_file import read_json
from phi4_mlx.hub import resolve

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

ROWS = 16  # questions that are answered together, and kept together


@dataclass
class Comparator:
    """A model that mlx-lm runs.

    Attributes:
        name: the name that it was loaded by, for tables.
        fingerprint: of weights, config and chat template.
        model: mlx-lm's.
        tokenizer: mlx-lm's.
        group: None: a comparator runs on one machine.
    """

    name: str
    fingerprint: str
    model: Any
    tokenizer: Any
    group: None = None


def load_comparator(name: str) -> Comparator | Subject:
    """Loads a comparator: a model of our kinds as our own, any other by mlx-lm.

    Args:
        name: a folder or a Hub id.

    Raises:
        Phi4Error: it cannot be loaded.
    """
    folder = resolve(name)
    config = read_json(folder / "config.json")
    if config.get("model_type") in KINDS:
        return load_subject(name)
    from mlx.utils import tree_flatten
    from mlx_lm import load

    from phi4_mlx.fingerprint import checksum

    try:
        model, tokenizer = load(str(folder))[:2]
    except (MemoryError, Phi4Error):
        raise
    except Exception as error:  # mlx-lm has no exceptions of its own
        raise RequestError(
            f"{name} cannot be loaded by mlx-lm: {type(error).__name__}: {message_of(error):.300}"
        ) from error
    template = getattr(tokenizer, "chat_template", None) or ""
    header = json.dumps([config, str(template)], sort_keys=True).encode()
    arrays = [array for _, array in sorted(tree_flatten(model.parameters()))]
    return Comparator(name, checksum(header, arrays).hex()[:32], model, tokenizer)


def comparator_lm(comparator: Comparator, answers: Answers, options: Options, chat: bool) -> Any:
    """A comparator as lm-eval asks it.

    Args:
        comparator: the model.
        answers: where its answers are kept.
        options: of the evaluation.
        chat: True if questions are asked in its chat format.

    Raises:
        RequestError: it has no chat format, and one is needed.
    """
    quieten()
    if chat and not getattr(comparator.tokenizer, "chat_template", None):
        raise RequestError(f"{comparator.name} has no chat format, which this task needs")
    from mlx_lm.evaluate import MLXLM

    class MlxLm(MLXLM):
        """mlx-lm's class, whose every answer is on the disk before the next."""

        def __init__(self) -> None:
            super(MLXLM, self).__init__()
            self._model, self.tokenizer = comparator.model, comparator.tokenizer
            self._max_tokens = 2**31  # mlx-lm cuts contexts to this
            self._batch_size, self._sampler, self.use_chat_template = ROWS, None, chat
            self.drawn: list[tuple[Instance, Answer]] = []

        def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
            """Scores requests; those with one context together."""
            keys = [key_of(comparator.fingerprint, "mlx-lm score", list(each.args), chat) for each in requests]
            by_context: dict[str, dict[str, Instance]] = defaultdict(dict)
            for key, request in zip(keys, requests, strict=True):
                if answers.get(key) is None:
                    by_context[request.args[0]][key] = request
            for done, (context, asked) in enumerate(by_context.items()):
                if not self.tokenizer.encode(context, add_special_tokens=not chat):
                    raise RequestError(f"{comparator.name}: mlx-lm cannot score a text without a context")
                found = super().loglikelihood(list(asked.values()))
                answers.put_all({key: list(score) for key, score in zip(asked, found, strict=True)})
                _show(options, done + 1, len(by_context))
            return [(float(score), bool(greedy)) for score, greedy in (_kept(answers, key) for key in keys)]

        def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
            """Scores whole texts, one by one."""
            keys = [key_of(comparator.fingerprint, "mlx-lm rolling", list(each.args)) for each in requests]
            for done, (key, request) in enumerate(zip(keys, requests, strict=True)):
                if answers.get(key) is None:
                    answers.put(key, super().loglikelihood_rolling([request])[0])
                _show(options, done + 1, len(requests))
            return [float(_kept(answers, key)) for key in keys]

        def generate_until(self, requests: Sequence[Instance]) -> list[str]:
            """Answers questions; a stop string ends the answer, after the thoughts."""
            settings = [_settings(request.args[1], options) for request in requests]
            keys = [
                key_of(comparator.fingerprint, "mlx-lm answer", [each.args[0], chat], setting)
                for each, setting in zip(requests, settings, strict=True)
            ]
            missing = {
                key: (each.args[0], setting)
                for key, each, setting in zip(keys, requests, settings, strict=True)
                if answers.get(key) is None
            }
            waiting = list(missing)
            for start in range(0, len(waiting), ROWS):
                part = waiting[start : start + ROWS]
                answers.put_all(dict(zip(part, self._answers([missing[key] for key in part]), strict=True)))
                _show(options, start + len(part), len(waiting))
            found = [Answer(**_kept(answers, key)) for key in keys]
            self.drawn += zip(requests, found, strict=True)
            return [answer.content for answer in found]

        def _answers(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
            import mlx.core as mx
            from mlx_lm import batch_generate
            from mlx_lm.sample_utils import make_sampler

            first = asked[0][1]
            mx.random.seed(int(hashlib.sha256(json.dumps([first["seed"], asked[0][0]]).encode()).hexdigest()[:8], 16))
            prompts = [self.tokenizer.encode(text, add_special_tokens=not chat) for text, _ in asked]
            texts = batch_generate(
                self._model,
                self.tokenizer,
                prompts,
                max_tokens=[setting["max_tokens"] for _, setting in asked],
                sampler=make_sampler(temp=first["temp"], top_p=first["top_p"]),
            ).texts
            return [
                self._answer(text, setting, len(prompt))
                for text, (_, setting), prompt in zip(texts, asked, prompts, strict=True)
            ]

        def _answer(self, text: str, setting: Mapping[str, Any], prompt_tokens: int) -> dict[str, Any]:
            """A text as an answer, its reasoning apart."""
            end = self.tokenizer.think_end if self.tokenizer.has_thinking else None
            reasoning, found, content = text.partition(end) if end else ("", "", text)
            reasoning, content = (reasoning, content) if found else ("", text)
            stops = [place for stop in setting["stops"] if stop and (place := content.find(stop)) >= 0]
            content = content[: min(stops)] if stops else content
            tokens = len(self.tokenizer.encode(text, add_special_tokens=False))
            return {
                "text": text, "content": content, "reasoning": reasoning, "calls": (),
                "finish_reason": "length" if tokens >= setting["max_tokens"] else "stop",
                "tokens": tokens, "prompt_tokens": prompt_tokens,
            }  # fmt: skip

    return MlxLm()


def _settings(given: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """A task's settings of generation, or the options in their place."""
    from lm_eval.models.utils import normalize_gen_kwargs

    task = normalize_gen_kwargs(dict(given))
    temp = task["temperature"] if options.temp is None else options.temp
    return {
        "max_tokens": options.max_tokens or task["max_gen_toks"],
        "stops": list(task["until"]),
        "temp": temp,
        "top_p": (task.get("top_p", 1.0) if options.top_p is None else options.top_p) if temp else 1.0,
        "seed": options.seed if temp else 0,
    }


def _kept(answers: Answers, key: str) -> Any:
    """An answer that is known to be on the disk."""
    value = answers.get(key)
    assert value is not None
    return value


def _show(options: Options, done: int, total: int) -> None:
    if options.progress is not None:
        options.progress(done, total)
