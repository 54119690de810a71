"""Lark rules that place tool calls in an answer, with control tokens or, for a tokenizer without them, spelled as text.

Text runs until the control token; where the token is spelled, its text begins the calls.
"""

from __future__ import annotations

import json

from phi4_mlx.tools.markup import CALLS_CLOSE, CALLS_OPEN

MAY_CALL = f"start: TEXT | opened @calls {CALLS_CLOSE}\nopened: TEXT {CALLS_OPEN}\nTEXT: /(.|\\n)*/\n"
MUST_CALL = f"start: {CALLS_OPEN} @calls {CALLS_CLOSE}\n"
CALL_OR_ANSWER = f"start: @answer | {CALLS_OPEN} @calls {CALLS_CLOSE}\n"

_SPELLED = {
    MAY_CALL: f'start: TEXT | opened @calls "{CALLS_CLOSE}"\nopened[lazy]: TEXT "{CALLS_OPEN}"\nTEXT: /(.|\\n)*/\n',
    MUST_CALL: f'start: "{CALLS_OPEN}" @calls "{CALLS_CLOSE}"\n',
    CALL_OR_ANSWER: f'start: @answer | "{CALLS_OPEN}" @calls "{CALLS_CLOSE}"\n',
}


def spelled(text: str) -> str:
    """Replaces the rules above by their spelled forms; any other grammar is returned as it is.

    Args:
        text: a grammar in llguidance's form.
    """
    if CALLS_OPEN not in text:
        return text
    whole = json.loads(text)
    main = whole["grammars"][0]
    main["lark_grammar"] = _SPELLED.get(main.get("lark_grammar"), main.get("lark_grammar"))
    return json.dumps(whole)
