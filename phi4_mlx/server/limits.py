"""Limits on a request: its bytes, its time and the sizes of its fields.

Limits that other parts of the package share stay with them: those of samplers in terminal.limits, and
`MAX_TOOLS_BYTES` in tools.declarations.
"""

from __future__ import annotations

# HTTP
BODY_BYTES = 16 * 2**20
HEADER_BYTES = 32 * 2**10
REQUEST_S = 30.0  # seconds to send the headers, and again to send the body
SMALL_BODY_BYTES = 2**16  # a body up to this size always has room
BODIES = 4  # as many bodies of the largest size have room together, until their requests are answered
WRITE_BYTES = 2**16  # written at a time, and buffered by the kernel; 650 KB/s at a round trip of 100 ms
WRITE_S = 20.0  # in which a client must read what is written, 3 KB a second
STOPPING_WRITE_S = 2.0  # the same while the server stops
GRACE_S = 30.0  # for running answers while the server stops
STORING_S = 5.0  # for the prompt caches in memory to be stored, at the end
SPARE_DESCRIPTORS = 64  # that connections leave free; a new engine takes about ten

# Pictures and sounds
MEDIA_BODY_BYTES = 48 * 2**20  # a photo of 12 MB is 16 MB in base64, and each turn sends those before again
MEDIA_THREADS = 2  # that decode
MEDIA_BYTES = 2**30  # of all decoded media, until their requests are answered
KEPT_MEDIA_BYTES = 2**27  # of decoded media that are kept for the next turn

# Forms with a sound to transcribe
UPLOAD_BYTES = 2**29  # of a form, in a temporary file; half an hour of stereo at 44.1 kHz takes 318 MB
UPLOAD_S = 300.0  # seconds to send a form
UPLOADS_LIMIT = 4  # at a time
FORM_FIELDS_LIMIT = 64
FORM_NAME_CHARS_LIMIT = 256
FORM_VALUE_BYTES = 2**16  # of a field that is not the file
LONGEST_SPEECH_S = 6 * 3600.0

# A body as JSON
BRACKETS_LIMIT = 500_000  # lists and objects; Python builds more too slowly, and holds the GIL meanwhile
DEPTH_LIMIT = 200  # levels; arguments and schemas nest, and Python's own stack ends at 1,000
NAME_CHARS_LIMIT = 256  # of a model, a tool or an id
SCHEMA_CHARS_LIMIT = 65_536  # of a tool's description, a pattern or a grammar
SHOWN_CHARS = 60  # of a value that an error message quotes

# A conversation or a prompt
MESSAGES_LIMIT = 10_000
PARTS_LIMIT = 1_000  # in one message
CALLS_LIMIT = 128  # in one message
PROMPTS_LIMIT = 128  # in one request, each counted as often as it is answered

# Sampling and answers
ANSWERS_LIMIT = 8  # n: answers to one prompt
STOPS_LIMIT = 16
STOP_CHARS_LIMIT = 1_000  # of a stop string or a choice
CHOICES_LIMIT = 1_000
TOP_LOGPROBS_LIMIT = 20
BIAS_ENTRIES_LIMIT = 1_024
BIAS_LIMIT = 100.0
API_TEMPERATURE_LIMIT = 2.0  # OpenAI's
API_PENALTY_LIMIT = 2.0  # OpenAI's
PRIORITY_LIMIT = 1_000_000  # and its negative

# Fields of single APIs
INCLUDE_LIMIT = 32
METADATA_LIMIT = 16  # pairs
METADATA_CHARS_LIMIT = 512  # of one value

# Calls of the server's own tools
TOOL_BODY_BYTES = 2**20  # of a call; no answer of a model is longer
TOOL_CALLS_LIMIT = 8  # at a time
TOOL_S = 125.0  # for a call; that of an MCP server has 120 s of its own
