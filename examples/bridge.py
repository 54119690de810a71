"""The bridge from Python: plain types, streams of events, and tools that this program runs itself.

    python examples/bridge.py [--model demo]

A Swift app does the same through PythonKit, or with a subprocess over JSON Lines: see `examples/bridge.swift`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from phi4_mlx import bridge

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


def product(expression: str) -> str:
    """The calculator: it multiplies two whole numbers."""
    left, _, right = expression.partition("*")
    return str(int(left) * int(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    loaded = bridge.load(parser.parse_args().model)
    if loaded["event"] == "error":
        raise SystemExit(loaded["message"])
    model = loaded["model"]

    # Read a stream event by event. Any thread may end it with `bridge.cancel(stream)`.
    stream = bridge.start_chat(model, [{"role": "user", "content": "hello"}], max_tokens=60)
    while (event := bridge.next_event(stream))["event"] == "token":
        print(event["text"], end="", flush=True)
    print(f"\n{event['event']}: {event.get('reason') or event['message']}")

    # The model requests a call, this program runs it, and the model answers from the result.
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 12 * 31?"}]
    answer = bridge.chat(model, messages, tools=[CALCULATOR], max_tokens=100)
    messages.append(answer["message"])
    for call in answer["message"].get("tool_calls", []):
        arguments = call["function"]["arguments"]
        print(f"called {call['function']['name']} with {arguments}")
        result = product(**json.loads(arguments))
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    print(bridge.chat(model, messages, tools=[CALCULATOR], max_tokens=100)["text"])
    bridge.unload(model)


if __name__ == "__main__":
    main()
