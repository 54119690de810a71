"""The chat formats as templates for other programs: Jinja for llama.cpp, Go's for Ollama.

Both render a conversation as `ChatFormat.render` does, tools and calls included. Go writes the JSON of tools without
spaces and with the schema of all arguments, where Jinja writes the flat form that the model was trained on.

Source: the templates of Jinja 3 and of Go's text/template; Ollama's docs/template.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi4_mlx.export.vocabulary import Vocabulary
from phi4_mlx.tokens.chat_format import CHAT_FORMATS, ChatFormat, Phi4MiniReasoning, Phi4Reasoning
from phi4_mlx.tools.markup import CALLS_CLOSE, CALLS_OPEN, TOOLS_CLOSE, TOOLS_OPEN


@dataclass(frozen=True)
class _Turns:
    """The text around the turns of a chat format.

    Attributes:
        opening: the text before a message, with {} for its role.
        closing: the text after one.
        last: the text after a conversation that no answer follows.
        system: the text that begins the first turn, before the caller's system message.
        tools: whether the model was trained to call tools.
        skips_empty: whether an empty system message has no turn.
    """

    opening: str = "<|{}|>"
    closing: str = "<|end|>"
    last: str = "<|endoftext|>"
    system: str = ""
    tools: bool = True
    skips_empty: bool = False


_IM = _Turns("<|im_start|>{}<|im_sep|>", "<|im_end|>", last="", tools=False)
_TURNS = {
    "phi4-mini": _Turns(),
    "phi4-mini-flash-reasoning": _Turns(),
    "phi4-mini-reasoning": _Turns(system=Phi4MiniReasoning.SYSTEM),
    "phi3.5-mini": _Turns("<|{}|>\n", "<|end|>\n", tools=False, skips_empty=True),
    "phi4": _IM,
    "phi4-reasoning": _Turns(_IM.opening, _IM.closing, last="", system=Phi4Reasoning.SYSTEM, tools=False),
}
assert _TURNS.keys() == CHAT_FORMATS.keys()

# Tools in the flat form: each argument's schema by its name, with "str" for "string".
_JINJA_TOOLS = (
    "{%- macro object(fields) -%}{{ '{' }}{% for key, value in fields.items() %}{{ key | tojson }}: "
    "{{ ('str' if key == 'type' and value == 'string' else value) | tojson }}{{ ', ' if not loop.last else '' }}"
    "{% endfor %}{{ '}' }}{%- endmacro -%}"
    "{%- macro declared(tools) -%}{{ 'OPEN[' }}{% for tool in tools %}"
    "{% set function = tool.function if tool.function is defined else tool %}"
    "{% set given = function.parameters if function.parameters else {} %}"
    "{% set arguments = given.properties if given.properties is defined else given if given.type is not defined else {}"
    " %}"
    "{{ '{' }}\"name\": {{ function.name | tojson }}"
    "{% if function.description %}, \"description\": {{ function.description | tojson }}{% endif %}"
    ", \"parameters\": {{ '{' }}{% for name, argument in arguments.items() %}{{ name | tojson }}: "
    "{% if argument is mapping %}{{ object(argument) }}{% else %}{{ argument | tojson }}{% endif %}"
    "{{ ', ' if not loop.last else '' }}{% endfor %}{{ '}}' }}{{ ', ' if not loop.last else '' }}{% endfor %}"
    "{{ ']CLOSE' }}{%- endmacro -%}"
).replace("OPEN", TOOLS_OPEN).replace("CLOSE", TOOLS_CLOSE)
_JINJA_CALLS = (
    "{% if message.tool_calls %}{{ 'OPEN[' }}{% for call in message.tool_calls %}"
    "{% set function = call.function if call.function is defined else call %}"
    "{{ '{' }}\"name\": {{ function.name | tojson }}, \"arguments\": "
    "{{ function.arguments if function.arguments is string else function.arguments | tojson }}{{ '}' }}"
    "{{ ', ' if not loop.last else '' }}{% endfor %}{{ ']CLOSE' }}{% endif %}"
).replace("OPEN", CALLS_OPEN).replace("CLOSE", CALLS_CLOSE)
_JINJA_GIVEN = (  # an expression: the "tools" of a system message, as in Microsoft's template
    "(('OPEN' + message.tools + 'CLOSE' if message.tools is string else declared(message.tools))"
    " if message.role == 'system' and message.tools else '')"
).replace("OPEN", TOOLS_OPEN).replace("CLOSE", TOOLS_CLOSE)


def jinja_template(chat_format: ChatFormat, vocabulary: Vocabulary) -> str:
    """The Jinja template of a chat format, for messages and tools in OpenAI's form.

    Args:
        chat_format: the format.
        vocabulary: its control tokens may remove the white space beside them, which llama.cpp leaves in place.
    """
    turns = _TURNS[chat_format.name]
    after = turns.opening.format("user").rstrip().endswith(tuple(vocabulary.strips_after))
    before = turns.closing.startswith(tuple(vocabulary.strips_before))
    strip = {(True, True): ".strip()", (True, False): ".lstrip()", (False, True): ".rstrip()"}.get((after, before), "")
    content = "(message.content if message.content else '')"
    begin, first = "", ""
    if turns.system:
        given = f"{content} + {_JINJA_GIVEN}" if turns.tools else content
        begin = (
            "{% set system = namespace(text='') %}{% for message in messages %}{% if message.role == 'system' %}"
            f"{{% set system.text = system.text + ' ' + {given} %}}{{% endif %}}{{% endfor %}}"
            f"{_quoted(turns.opening.format('system') + turns.system)}"
            f"{{{{ system.text{'.rstrip()' if before else ''} }}}}"
            f"{'{% if tools %}{{ declared(tools) }}{% endif %}' if turns.tools else ''}{_quoted(turns.closing)}"
        )
    elif turns.tools:
        begin = (
            "{% set found = namespace(shown=not tools) %}"
            "{% if tools and not (messages | selectattr('role', 'equalto', 'system') | list) %}"
            f"{_quoted(turns.opening.format('system'))}{{{{ declared(tools) }}}}{_quoted(turns.closing)}"
            "{% set found.shown = true %}{% endif %}"
        )
        first = (
            "{% if message.role == 'system' and not found.shown %}{{ declared(tools) }}{% set found.shown = true %}"
            f"{{% else %}}{{{{ {_JINJA_GIVEN} }}}}{{% endif %}}"
        )
    opening = _quoted(turns.opening).replace("{}", "' + message.role + '")
    turn = f"{opening}{{{{ {content}{strip} }}}}{first}{_JINJA_CALLS if turns.tools else ''}{_quoted(turns.closing)}"
    if turns.system:
        turn = f"{{% if message.role != 'system' %}}{turn}{{% endif %}}"
    if turns.skips_empty:
        turn = f"{{% if message.role != 'system' or message.content %}}{turn}{{% endif %}}"
    return (
        f"{_JINJA_TOOLS if turns.tools else ''}{begin}{{% for message in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{_quoted(turns.opening.format('assistant'))}"
        f"{{% else %}}{_quoted(turns.last)}{{% endif %}}"
    )


def _quoted(text: str) -> str:
    """A Jinja expression that writes a text."""
    literal = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"{{{{ '{literal}' }}}}"


_GO_TOOLS = (
    "{{ if .Tools }}OPEN[{{ range $n, $tool := .Tools }}{{ if $n }}, {{ end }}{{ json $tool.Function }}{{ end }}]CLOSE"
    "{{ end }}"
).replace("OPEN", TOOLS_OPEN).replace("CLOSE", TOOLS_CLOSE)
_GO_CALLS = (
    "{{ if .ToolCalls }}OPEN[{{ range $n, $call := .ToolCalls }}{{ if $n }}, {{ end }}"
    '{"name": {{ json $call.Function.Name }}, "arguments": {{ json $call.Function.Arguments }}}{{ end }}]CLOSE{{ end }}'
).replace("OPEN", CALLS_OPEN).replace("CLOSE", CALLS_CLOSE)


def go_template(chat_format: ChatFormat) -> str:
    """The Go template of a chat format, for the variables that Ollama gives."""
    turns = _TURNS[chat_format.name]
    shown = "{{ if .System }} {{ .System }}{{ end }}" if turns.system else "{{ .System }}"
    system = f"{turns.opening.format('system')}{turns.system}{shown}{_GO_TOOLS if turns.tools else ''}{turns.closing}"
    if not turns.system:
        system = f"{{{{ if {'or .System .Tools' if turns.tools else '.System'} }}}}{system}{{{{ end }}}}"
    # An assistant's message at the end is the beginning of the answer, which goes on.
    turn = (
        "{{ $last := eq (len (slice $.Messages $at)) 1 }}"
        f"{turns.opening.replace('{}', '{{ .Role }}')}{{{{ .Content }}}}{_GO_CALLS if turns.tools else ''}"
        f'{{{{ if not (and $last (eq .Role "assistant")) }}}}{turns.closing}'
        f"{{{{ if $last }}}}{turns.opening.format('assistant')}{{{{ end }}}}{{{{ end }}}}"
    )
    return f'{system}{{{{ range $at, $_ := .Messages }}}}{{{{ if ne .Role "system" }}}}{turn}{{{{ end }}}}{{{{ end }}}}'
