"""Requests in the shapes in which coding tools and chat programs send them: a conversation with tools, streamed.

Written from public reports of their requests; the texts are made up.
"""

from __future__ import annotations

import json
from typing import Any

Body = dict[str, Any]

READ = {
    "type": "object",
    "properties": {"path": {"type": "string", "description": "The file"}, "limit": {"type": "integer"}},
    "required": ["path"],
    "additionalProperties": False,
    "$schema": "http://json-schema.org/draft-07/schema#",
}
SHELL = {
    "type": "object",
    "properties": {"command": {"type": "array", "items": {"type": "string"}}, "timeout_ms": {"type": "number"}},
    "required": ["command"],
    "additionalProperties": False,
}


def function(name: str, schema: Body) -> Body:
    """A tool in the form of chat completions."""
    return {"type": "function", "function": {"name": name, "description": f"Runs {name}.", "parameters": schema}}


def claude_code() -> Body:
    """/v1/messages?beta=true."""
    cached = {"cache_control": {"type": "ephemeral"}}
    return {
        "model": "claude-sonnet-4-5",
        "max_tokens": 32_000,
        "stream": True,
        "system": [
            {"type": "text", "text": "You are an agent for the command line."},
            {"type": "text", "text": "Working folder: demo", **cached},
        ],
        "metadata": {"user_id": "user_1_session_2"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "tools": [
            {"name": "Read", "description": "Reads a file.", "input_schema": READ},
            {"name": "Bash", "description": "Runs a command.", "input_schema": SHELL, "defer_loading": True, **cached},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
            {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
            {"type": "bash_20250124", "name": "bash"},
            {"type": "memory_20250818", "name": "memory"},
            {"type": "mcp_toolset", "mcp_server_name": "docs"},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is in a.txt?", **cached}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I should read it.", "signature": "c2ln"},
                    {"type": "redacted_thinking", "data": "eHh4"},
                    {"type": "text", "text": "I will look."},
                    {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {"query": "a.txt"}},
                    {
                        "type": "web_search_tool_result",
                        "tool_use_id": "srv_1",
                        "content": [
                            {
                                "type": "web_search_result",
                                "title": "A",
                                "url": "https://a.example",
                                "encrypted_content": "q",
                            }
                        ],
                    },
                    {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a.txt"}},
                    {"type": "tool_use", "id": "toolu_2", "name": "Read", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no path", "is_error": True},
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_1",
                        "content": [
                            {"type": "text", "text": "one"},
                            {"type": "tool_reference", "tool_name": "Bash"},
                            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                        ],
                        **cached,
                    },
                    {"type": "text", "text": "<system-reminder>Be brief.</system-reminder>"},
                ],
            },
        ],
    }


def codex() -> Body:
    """/v1/responses."""
    return {
        "model": "gpt-5-codex",
        "instructions": "You are a coding agent.",
        "stream": True,
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199",
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "reasoning": {"effort": "medium", "summary": "auto"},
        "text": {"verbosity": "low"},
        "tools": [
            {"type": "function", "name": "shell", "description": "Runs.", "strict": False, "parameters": SHELL},
            {"type": "local_shell"},
            {"type": "web_search", "external_web_access": False},
            {"type": "image_generation"},
            {
                "type": "custom",
                "name": "apply_patch",
                "format": {"type": "grammar", "syntax": "lark", "definition": "s"},
            },
        ],
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: read-only"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "fix the test"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "gAAA"},
            {
                "type": "local_shell_call",
                "call_id": "c1",
                "status": "completed",
                "action": {"type": "exec", "command": ["ls"]},
            },
            {"type": "local_shell_call_output", "call_id": "c1", "output": "a.py"},
            {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": "*** Begin Patch"},
            {"type": "custom_tool_call_output", "call_id": "c2", "output": "Done"},
            {
                "type": "web_search_call",
                "id": "ws_1",
                "status": "completed",
                "action": {"type": "search", "query": "x"},
            },
            {"type": "function_call", "call_id": "c3", "name": "shell", "arguments": '{"command": ["py'},
            {"type": "function_call_output", "call_id": "c3", "output": [{"type": "input_text", "text": "not JSON"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I try again."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "go on"}]},
        ],
    }


def open_webui() -> Body:
    """/v1/chat/completions of a chat program, with an old picture and a tool's result."""
    call = {"index": 0, "id": "call_9", "type": "function", "function": {"name": "get_time", "arguments": ""}}
    return {
        "model": "gpt-4o",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": -1,
        "chat_id": "x",
        "session_id": "y",
        "metadata": {"variables": {}},
        "messages": [
            {"role": "system", "content": "Be kind."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                ],
            },
            {"role": "assistant", "content": "I cannot see it."},
            {"role": "user", "content": "And the time?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_9", "content": "12:00"},
            {"role": "user", "content": "Thanks"},
        ],
        "tools": [function("get_time", {"type": "object", "properties": {}})],
    }


def aider() -> Body:
    """/v1/chat/completions without tools; file contents in user messages, an empty answer in the history."""
    return {
        "model": "openai/phi",
        "temperature": 0,
        "stream": True,
        "messages": [
            {"role": "system", "content": "Act as an expert software developer."},
            {"role": "user", "content": "a.py\n```\nx = 1\n```\n"},
            {"role": "assistant", "content": "Ok."},
            {"role": "user", "content": "Add y."},
            {"role": "assistant", "content": None},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Again, please.", "cache_control": {"type": "ephemeral"}}],
            },
        ],
        "extra_body": {},
        "num_ctx": 8_192,
    }


def zed() -> Body:
    """/v1/chat/completions of an editor's agent: a cut call in the history, its error, and a large limit."""
    cut = {"id": "1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "a'}}
    return {
        "model": "phi-4-mini",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 1_000_000_000,
        "stop": [],
        "temperature": 1.0,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning_effort": "medium",
        "prompt_cache_key": "thread-1",
        "tools": [function("read_file", READ), function("terminal", SHELL)],
        "messages": [
            {"role": "system", "content": "You are an editor's agent."},
            {"role": "user", "content": [{"type": "text", "text": "read a.txt"}]},
            {"role": "assistant", "content": None, "tool_calls": [cut]},
            {"role": "tool", "content": [{"type": "text", "text": "Error parsing input JSON"}], "tool_call_id": "1"},
            {"role": "user", "content": [{"type": "text", "text": "try again"}]},
        ],
    }


CLIENTS = {
    "/v1/messages?beta=true": claude_code,
    "/v1/responses": codex,
    "//v1/chat/completions": open_webui,
    "/v1/chat/completions": aider,
    "/v1/chat/completions/": zed,
}


def history(text: str) -> Body:
    """A chat completion whose history has a call with these arguments."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.loads(text)}}
    messages: list[Body] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    return {"messages": [*messages, {"role": "tool", "tool_call_id": "1", "content": "no"}]}
