"""White space as the tokenizer libraries see it, and the length of its runs."""

from __future__ import annotations

# What `tokenizers` strips beside a control token: Unicode's White_Space, which excludes Python's \x1c to \x1f.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


def longest_run_exceeds(text: str, limit: int) -> bool:
    """True if more than `limit` consecutive characters are white space; reads each character at most twice.

    Args:
        text: any text.
        limit: characters, at least 1.
    """
    for at in range(limit, len(text), limit):  # a longer run covers one of these indices
        before, after = text[at - limit : at], text[at : at + limit]
        run = len(before) - len(before.rstrip(WHITE_SPACE)) + len(after) - len(after.lstrip(WHITE_SPACE))
        if run > limit:
            return True
    return False
