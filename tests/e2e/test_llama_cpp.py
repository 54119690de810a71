"""GGUF files in llama.cpp, by the wheel xllamacpp: tokens, probabilities, tokenizer and chat template equal ours.

Below the boundary of the RoPE table, which llama.cpp chooses by the allocated context, here 256 tokens.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phi4_mlx.adapters.layers import load_adapter
from phi4_mlx.checkpoint import load
from phi4_mlx.export.gguf_file import GGUF_FILE, write_gguf
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.tokens.chat_format import CHAT_FORMATS
from phi4_mlx.tokens.tokenizer import Tokenizer
from tests.adapters import adapted, save_adapter
from tests.conftest import make_tiny_model, write_tiny_checkpoint
from tests.conversations import CALLS, PLAIN, TOOLS, write_tokenizer

llama = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'xllamacpp>=2026.10'")

CONTEXT = 256
SHAPE = {"original_max_position_embeddings": CONTEXT, "max_position_embeddings": 4096}
TOKENS = 40
Sources = dict[str, str | Path]  # the fixture `sources`

TEXTS = [
    "", "Hello world", "  leading", "trailing  ", "a\n\n\nb", "\t\ttabs\r\n\r\n", "don't DON'T I'LL he'd we've 's 'T",
    "1234567890 12 345 ½ ①② Ⅷ", "naïve café ÀÉÎ Ångström Straße", "日本語のテキスト 漢字かな", "한국어 텍스트",
    "Привет МИР Ёлка ΑΒΓ αβγ", "😀👍🏽👨‍👩‍👧‍👦🇩🇪", "مرحبا שלום", "e\u0301 a\u0308\u0323", "\u00a0nbsp\u2003em\u200bzw",
    "camelCaseHTTPServer XMLHttpRequest", "def f(x):\n    return x**2  # sq\n", '{"a": [1, 2.5e-3, null]}',
    "//// path/to/file\n/", "<|user|> <|end|>", "\ufffd\ufeffBOM", "ǅungla ʰʷ ªº", "x" * 300, " " * 200 + "y",
    "\x00\x01", "İstanbul ıi", "!?!?...---===", "\n \n  \n", "word\u2028line\u0085x", "१२३ ٣٤٥٦",
]  # fmt: skip


class Llama:
    """llama.cpp's server in this process, with one GGUF file."""

    def __init__(self, folder: Path, context: int = CONTEXT):
        params = llama.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(folder / GGUF_FILE), context, 1
        params.warmup = params.fit_params = False
        params.use_jinja, params.verbosity, params.cpuparams.n_threads = True, -1, 1
        self._server = llama.Server(params)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a request over HTTP."""
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text: str, specials: bool = False) -> list[int]:
        """The ids of a text."""
        body = {"content": text, "parse_special": specials, "add_special": False}
        return list(self.post("/tokenize", body)["tokens"])

    def greedy(self, ids: Sequence[int], banned: Sequence[int], rows: int) -> tuple[list[int], np.ndarray]:
        """Greedy tokens after a prompt, and the log-probabilities [T, V] from which each was taken."""
        body = {"prompt": list(ids), "n_predict": TOKENS, "temperature": 0, "n_probs": rows, "cache_prompt": False}
        steps = self.post("/completion", body | {"logit_bias": [[token, False] for token in banned]})
        found = np.full((len(steps["completion_probabilities"]), rows), -np.inf)
        for row, step in zip(found, steps["completion_probabilities"], strict=True):
            for each in step["top_logprobs"]:
                row[each["id"]] = each["logprob"]
        return [step["id"] for step in steps["completion_probabilities"]], found


def unprintable(tokenizer: Tokenizer, rows: int) -> list[int]:
    """Ids that llama.cpp does not report one by one: they are no whole text, or end the answer."""

    def whole(token: int) -> bool:
        data = tokenizer.token_bytes(token)
        return bool(data) and data.isascii() and token not in tokenizer.control_ids.values()

    return [token for token in range(rows) if not whole(token)]


def log_probabilities(model: LanguageModel, ids: Sequence[int], count: int) -> np.ndarray:
    """Of the tokens after each of the last `count` ids, [count, V]."""
    logits = model(mx.array([ids]))[0, -count:].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def compare(folder: Path, model: LanguageModel, tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[int, float]:
    """Greedy tokens that equal ours, of `TOKENS`, and the mean KL divergence in nats."""
    rows = model.config.vocab_size
    banned = unprintable(tokenizer, rows)
    tokens, theirs = Llama(folder).greedy(prompt, banned, rows)
    assert len(tokens) == TOKENS
    ours = log_probabilities(model, [*prompt, *tokens[:-1]], TOKENS)
    allowed = ours.copy()
    allowed[:, banned] = -np.inf
    likely = np.isfinite(theirs)
    divergence = np.where(likely, np.exp(ours) * (ours - np.where(likely, theirs, 0)), 0).sum(-1)
    return int((allowed.argmax(-1) == tokens).sum()), float(divergence.mean())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The demo and two tiny random models."""
    folder = tmp_path_factory.mktemp("sources")
    untied = {"tie_word_embeddings": False, "num_key_value_heads": 6, "partial_rotary_factor": 1.0}
    return {
        "demo": "demo",
        "tied": write_tiny_checkpoint(folder / "tied", seed=2, **SHAPE),
        "untied": write_tiny_checkpoint(folder / "untied", seed=1, **SHAPE, **untied),
    }


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "my-phi-3-ft", **SHAPE)
    write_gguf(folder, tmp_path / "out")
    _, tokenizer = load(folder)
    assert Llama(tmp_path / "out").tokens("a  b") == tokenizer.encode("a  b")


@pytest.mark.parametrize("name", ["demo", "tied", "untied"])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_greedy_tokens_and_probabilities(name: str, kind: str, sources: Sources, tmp_path: Path) -> None:
    model, tokenizer = load(sources[name])
    write_gguf(sources[name], tmp_path / "out", kind=kind)
    equal, divergence = compare(tmp_path / "out", model, tokenizer, range(20, 60))
    if kind == "F16":
        assert equal == TOKENS
    assert divergence < (1e-4 if kind == "F16" else 1e-3)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merged_fine_tune_answers_as_here(kind: str, sources: Sources, tmp_path: Path) -> None:
    save_adapter(adapted(make_tiny_model(2, **SHAPE), kind, seed=1), tmp_path / "adapter", {})
    model, tokenizer = load(sources["tied"])
    write_gguf(sources["tied"], tmp_path / "out", tmp_path / "adapter")
    assert compare(tmp_path / "out", model, tokenizer, range(20, 60))[1] > 0.1
    load_adapter(model, tmp_path / "adapter")
    equal, divergence = compare(tmp_path / "out", model, tokenizer, range(20, 60))
    assert equal == TOKENS and divergence < 1e-4


def test_a_longer_context_uses_the_long_table_throughout(sources: Sources, tmp_path: Path) -> None:
    """The reason of the note, and of `num_ctx` in the Modelfile."""
    model, tokenizer = load(sources["tied"])
    write_gguf(sources["tied"], tmp_path / "out")
    prompt = range(20, 60)
    banned = unprintable(tokenizer, model.config.vocab_size)
    tokens, theirs = Llama(tmp_path / "out", 2 * CONTEXT).greedy(prompt, banned, model.config.vocab_size)
    ids = [*prompt, *tokens[:-1]]
    short = log_probabilities(model, ids, TOKENS)
    hidden = model.hidden(mx.array([ids]), model.make_cache(regime="long"))
    logits = model.logits(hidden)[0, -TOKENS:].astype(mx.float32)
    long = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert np.abs(long - theirs)[np.isfinite(theirs)].max() < 0.05
    assert np.abs(short - theirs)[np.isfinite(theirs)].max() > 0.5


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_ids_and_prompts_are_ours(name: str, tmp_path: Path) -> None:
    source: str | Path = "demo"
    if name != "phi4-mini":
        source = write_tiny_checkpoint(tmp_path / "source", **SHAPE)
        write_tokenizer(name, source)
    _, tokenizer = load(source, chat_format=name)
    write_gguf(source, tmp_path / "out", chat_format=name)
    server = Llama(tmp_path / "out")
    for text in TEXTS:
        assert server.tokens(text) == tokenizer.encode(text), text
    conversations: list[Any] = [(messages, None) for messages in PLAIN.values()]
    if name.startswith("phi4-mini"):
        conversations += [(messages, TOOLS) for messages in PLAIN.values()]
        conversations += [(CALLS["call"], TOOLS), (CALLS["call"], None)]
    for messages, tools in conversations:
        body = {"messages": messages} | ({"tools": tools} if tools else {})
        prompt = server.post("/apply-template", body)["prompt"]
        assert server.tokens(prompt, specials=True) == tokenizer.apply_chat_template(messages, tools), prompt


def test_the_demo_calls_a_tool_and_answers_from_its_result(tmp_path: Path) -> None:
    """llama.cpp finds the call in the answer by the template in the file."""
    parameters = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
    function = {"name": "calculator", "description": "Evaluates an arithmetic expression.", "parameters": parameters}
    write_gguf("demo", tmp_path / "out")
    server, messages = Llama(tmp_path / "out"), [{"role": "user", "content": "What is 12*7?"}]
    body = {"tools": [{"type": "function", "function": function}], "temperature": 0, "max_tokens": 60}
    answer = server.post("/v1/chat/completions", body | {"messages": messages})["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "calculator"
    assert json.loads(call["function"]["arguments"]) == {"expression": "12 * 7"}
    messages += [answer["message"], {"role": "tool", "tool_call_id": call["id"], "content": "84"}]
    answer = server.post("/v1/chat/completions", body | {"messages": messages})["choices"][0]
    assert answer["message"]["content"] == "The answer is 84."
