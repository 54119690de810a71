"""The markup of tools and tool calls: the control tokens of the model, and the other ways to write a call.

Source: the Phi-4-mini-instruct model card; the other forms are those of vLLM's, BFCL's and LM Studio's parsers.
"""

from __future__ import annotations

from dataclasses import dataclass

TOOLS_OPEN, TOOLS_CLOSE = "<|tool|>", "<|/tool|>"  # around the declarations, in the system turn
CALLS_OPEN, CALLS_CLOSE = "<|tool_call|>", "<|/tool_call|>"  # around the calls, in an assistant turn


@dataclass(frozen=True)
class Form:
    """One way to write calls.

    Attributes:
        opener: the text before the JSON.
        closer: the text after the JSON, if the form has one.
        first: the characters that the JSON may begin with.
        whole: counts only if it is the entire answer.
    """

    opener: str
    closer: str
    first: str = '[{"'
    whole: bool = False


TAGGED = Form(CALLS_OPEN, CALLS_CLOSE)
REQUEST = Form("[TOOL_REQUEST]", "[END_TOOL_REQUEST]")
FUNCTOOLS = Form("functools", "", "[")
BARE = Form("", "", "[{", whole=True)
FENCED = Form("```", "```", "[{", whole=True)

MARKED = {form.opener: form for form in (TAGGED, REQUEST, FUNCTOOLS)}  # these count anywhere in an answer
FENCES = ("```json", "```")  # openers of FENCED, longest first
