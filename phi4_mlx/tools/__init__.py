"""Tools and tool calls: declarations, the parser of calls, running one, MCP servers."""
