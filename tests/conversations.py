"""Conversations that chat templates must render as the chat formats do, with tools and calls in OpenAI's form."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'It\'s "now" in a café <b>',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "of the world"},
                    "days": {"type": "integer", "enum": [1, 2]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "ping"}},
]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
PLAIN = {
    "one": [{"role": "user", "content": "hi"}],
    "spaces": [{"role": "system", "content": "  be  kind "}, {"role": "user", "content": "\n hi\n"}],
    "quotes": [{"role": "user", "content": "it's {{ x }} {% if %} \\n \"'"}],
    "turns": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "system", "content": "T"}, {"role": "user", "content": "d"},
    ],
    "empty": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
}  # fmt: skip
CALLS = {
    "call": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "1", "content": '{"t": 3}'}, {"role": "user", "content": "b"},
    ],
    "object": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "x", "tool_calls": [{"name": "now", "arguments": {"n": [1, None]}}]},
        {"role": "tool", "content": "3"},
    ],
    "own": [{"role": "system", "content": "S", "tools": [TOOLS[0]]}, {"role": "user", "content": "a"}],
    "text": [{"role": "system", "content": "S", "tools": "[]"}, {"role": "user", "content": "a"}],
}  # fmt: skip
