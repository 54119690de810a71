"""Tools and tool calls: declarations, the parser of calls, running a call, MCP servers."""
