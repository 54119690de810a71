"""`python -m phi4_mlx.server --model M`: serves a model to programs and a browser; by default only on this machine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from phi4_mlx.errors import Phi4Error, RequestError
from phi4_mlx.server.options import (
    KEY_VARIABLE,
    add_access_options,
    add_decoding_options,
    add_limit_options,
    add_log_option,
)
from phi4_mlx.terminal.command import (
    INTERRUPTED,
    OUR_MISTAKE,
    USER_MISTAKE,
    Parser,
    complain,
    run,
    typed,
    word,
)
from phi4_mlx.terminal.options import (
    add_model_options,
    add_parallel_option,
    add_tool_options,
    advised,
    check_speculation_options,
)

if TYPE_CHECKING:
    from phi4_mlx.server.engine.settings import Settings
    from phi4_mlx.server.engine.supervisor import Supervisor
    from phi4_mlx.server.grammar_pool import GrammarPool
    from phi4_mlx.server.guard import Guard
    from phi4_mlx.server.model_kind import ModelKind
    from phi4_mlx.tokens.prompt import MediaSettings
    from phi4_mlx.tokens.tokenizer import Tokenizer
    from phi4_mlx.tools.toolbox import Toolbox

PROG = typed("server")
STANDARD_ERROR = 2
SHOWN_TOOLS = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _serve, argv)


def _parser() -> Parser:
    parser = Parser(prog=PROG, description="Serve a model over HTTP: OpenAI's and Anthropic's APIs, and a chat page.")
    add_model_options(parser)
    add_parallel_option(parser)
    add_access_options(parser)
    parser.add_argument(
        "--adapters", type=word, metavar="FOLDER",
        help="folder of LoRA adapters that clients may name as the model (default: none)",
    )  # fmt: skip
    add_limit_options(parser)
    add_decoding_options(parser)
    add_tool_options(parser, "the chat page may run, each call after a question; API clients do not see them")
    add_log_option(parser)
    return parser


def _serve(args: argparse.Namespace) -> None:
    from phi4_mlx.ranks.session import check_over_ranks, is_follower, open_session
    from phi4_mlx.server.guard import is_loopback
    from phi4_mlx.server.log import logging_to
    from phi4_mlx.server.tools import opened_toolbox

    check_over_ranks(args, "prompt_cache_dir")
    if is_follower():
        with open_session(_settings(args).model_options):
            raise AssertionError("a follower does not come here")
    key = api_key(args.api_key)
    if key is None and not is_loopback(args.host):
        raise RequestError(
            f"--host {args.host} can be reached from other machines, so it needs --api-key (or {KEY_VARIABLE}); "
            "--host 127.0.0.1 does not"
        )
    with open_listener(args.host, args.port) as listener:  # first: a port in use fails before the model loads
        served = _served(args)
        # Not asyncio.run: that waits for threads, which may be busy with the request of a client that has left.
        with (
            logging_to(STANDARD_ERROR, args.log_level),
            opened_toolbox(args.tools, args.mcp, served.tokenizer, partial(complain, PROG)) as toolbox,
            contextlib.closing(asyncio.new_event_loop()) as loop,
        ):
            loop.run_until_complete(_run(args, key, served, toolbox, listener))


def open_listener(host: str, port: int) -> socket.socket:
    """A bound socket; `listen` makes it accept connections.

    Raises:
        RequestError: the address cannot be used.
    """
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    listener = None
    try:
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        # asyncio sets TCP_NODELAY only if the protocol is named; without it, small writes wait about 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((name, port))
    except (OSError, ValueError) as error:  # ValueError: a malformed name
        if listener is not None:
            listener.close()
        raise _unusable(host, port, error) from None
    return listener


def listen(listener: socket.socket, backlog: int) -> None:
    """Accepts connections from now on.

    Raises:
        RequestError: another program has begun to listen on the address.
    """
    try:
        listener.listen(backlog)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _unusable(host, port, error) from None


def _unusable(host: str, port: int, error: OSError | ValueError) -> RequestError:
    reason = (error.strerror if isinstance(error, OSError) else None) or "it is not a valid address"
    of_port = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
    return RequestError(
        f"cannot listen on {host:.100}:{port}: {reason}; choose another --{'port' if of_port else 'host'}"
    )


def api_key(option: str | None) -> str | None:
    """The key that clients must send. Takes it out of the environment, which tools inherit.

    Args:
        option: the value of `--api-key`; None if it is not given.

    Returns:
        The key; None for none.

    Raises:
        RequestError: no client can send it.
    """
    variable = os.environ.pop(KEY_VARIABLE, None)
    source, key = ("--api-key", option) if option else (KEY_VARIABLE, variable or None)
    if key is not None and (not key.isprintable() or key != key.strip()):
        raise RequestError(
            f"the key in {source} is not UTF-8, or has control characters or white space at an end; "
            "use letters, digits and punctuation"
        )
    return key


@dataclass(frozen=True)
class _Served:
    """A model to serve, read and checked.

    Attributes:
        settings: for the engine.
        name: of the model, for clients.
        tokenizer: of the model.
        vocabulary: number of token ids.
        kind: of the model.
    """

    settings: Settings
    name: str
    tokenizer: Tokenizer
    vocabulary: int
    kind: ModelKind

    @property
    def media(self) -> MediaSettings | None:
        """The settings of media; None with an adapter that is always on, whose place the model's own ones need."""
        return None if self.settings.adapter_path else self.tokenizer.media


def _served(args: argparse.Namespace) -> _Served:
    """Reads everything but the weights."""
    from phi4_mlx.checkpoint import load_config, load_tokenizer_and_format
    from phi4_mlx.files.manifest import verify_manifest
    from phi4_mlx.hub import DEFAULT_MODEL
    from phi4_mlx.models.safe import notice
    from phi4_mlx.server.model_kind import model_kind

    if switched_off := notice():
        complain(PROG, switched_off)
    check_speculation_options(args)
    name, settings = DEFAULT_MODEL if args.model is None else args.model, _settings(args)
    folder, adapters = Path(settings.model), settings.adapters
    if args.verify:
        verify_manifest(folder)
    config = load_config(folder)
    tokenizer = load_tokenizer_and_format(folder, args.chat_format, config.model_type)
    shown = Path(name).name if Path(os.path.expanduser(name)).is_dir() else name
    if shown in adapters:
        raise RequestError(f"{args.adapters} has an adapter called {shown}, like the model; rename one of them")
    kind = model_kind(folder, tokenizer.chat_format, args.chat_format is not None)
    return _Served(settings, shown, tokenizer, config.vocab_size, kind)


def _settings(args: argparse.Namespace) -> Settings:
    """The settings of the engine; a model of the Hub is downloaded."""
    from phi4_mlx.generation.cache_store.store import store_settings
    from phi4_mlx.hub import DEFAULT_MODEL, resolve
    from phi4_mlx.ranks.session import command_options
    from phi4_mlx.server.engine.settings import Settings

    adapters, store = _adapters(args.adapters), store_settings(args.prompt_cache_dir, args.prompt_cache_disk_bytes)
    return Settings(
        str(resolve(DEFAULT_MODEL if args.model is None else args.model, args.revision)),
        args.adapter_path,
        adapters,
        max_rows=args.decode_concurrency,
        kv_limit_bytes=args.kv_cache_bytes,
        prefix_limit_bytes=args.prompt_cache_bytes,
        chat_format=args.chat_format,
        parallel=args.parallel,
        store=store,
        kv_bits=args.kv_bits,
        speculate=args.speculate,
        draft_model=args.draft_model,
        max_step_ms=args.max_step_ms,
        command=command_options("server", args),
    )


async def _run(
    args: argparse.Namespace, key: str | None, served: _Served, toolbox: Toolbox, listener: socket.socket
) -> None:
    """Starts the engine and serves until a signal, or until no engine can be started any more."""
    from phi4_mlx.server.engine.supervisor import Supervisor
    from phi4_mlx.server.grammar_pool import GrammarPool
    from phi4_mlx.server.http_server import HttpServer, Lacks, Stop, cancel_the_rest, leave_soon, raise_descriptor_limit
    from phi4_mlx.server.request_log import RequestLog
    from phi4_mlx.server.tools import check_room

    raise_descriptor_limit()
    asyncio.get_running_loop().set_exception_handler(Lacks())
    supervisor, stop = Supervisor(served.settings, args.decode_concurrency + args.max_queue), Stop()
    grammars = GrammarPool()
    code = OUR_MISTAKE
    with stop.listening():
        lost = asyncio.create_task(supervisor.lost())
        try:
            complain(PROG, f"loading {served.name}")
            await stop.or_done(asyncio.create_task(supervisor.start()))
            if not stop.asked.is_set():
                check_room(toolbox, served.tokenizer, supervisor.longest)
                grammars.start()
                app = RequestLog(_guard(args, key, served, supervisor, grammars, toolbox))
                server = HttpServer(app, stop, supervisor.drain)
                listen(listener, server.config.backlog)
                complain(PROG, _summary(served, supervisor.longest, key, toolbox))
                complain(PROG, f"the chat page and the APIs are listening on {page_address(listener)}")
                await server.serve_beside(lost, listener)
                if lost.done():
                    raise RequestError(lost.result())
            if stop.signal is not None:
                complain(PROG, f"stopped by {signal.Signals(stop.signal).name}")
            code = INTERRUPTED if stop.signal == signal.SIGINT else 0
        except Phi4Error:
            if supervisor.job_ended:
                raise SystemExit(code) from None  # after the watcher's line
            code = USER_MISTAKE
            raise
        finally:
            grammars.stop()
            await supervisor.stop()
            await cancel_the_rest()
            leave_soon(code, len(args.mcp))
    if code == INTERRUPTED:
        raise KeyboardInterrupt


def _summary(served: _Served, longest: int, key: str | None, toolbox: Toolbox) -> str:
    """A line about the model, its context, its prompt caches, the key and the tools."""
    names = [tool["function"]["name"] for tool in toolbox.declarations]
    tools = ", ".join(names[:SHOWN_TOOLS]) + f" and {len(names) - SHOWN_TOOLS} more" * (len(names) > SHOWN_TOOLS)
    parts = [
        f"{served.name} ({served.kind}), context {longest:,} tokens",
        *([] if served.media is None else ["reads pictures and sounds"]),
        *([f"adapters: {', '.join(served.settings.adapters)}"] if served.settings.adapters else []),
        *([] if served.settings.store is None else [f"prompt caches in {served.settings.store.folder}"]),
        "no key is needed" if key is None else "clients must send the key",
        f"tools for the page: {tools}" if tools else "no tools",
    ]
    return "; ".join(parts)


def page_address(listener: socket.socket) -> str:
    """The address of the page; of all addresses that it listens on, one for this machine."""
    host, port = listener.getsockname()[:2]
    own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{own}]:{port}" if ":" in own else f"http://{own}:{port}"
    return url if own == host else f"all addresses, here {url}"


def _guard(
    args: argparse.Namespace,
    key: str | None,
    served: _Served,
    supervisor: Supervisor,
    grammars: GrammarPool,
    toolbox: Toolbox,
) -> Guard:
    """The ASGI application."""
    from phi4_mlx.server.apis.body import API_SAMPLING
    from phi4_mlx.server.app import App
    from phi4_mlx.server.bodies import Bodies
    from phi4_mlx.server.guard import LOOPBACK_NAMES, Guard, is_loopback
    from phi4_mlx.server.limits import BODY_BYTES, MEDIA_BODY_BYTES
    from phi4_mlx.server.media_reader import MediaReader
    from phi4_mlx.server.service import Service
    from phi4_mlx.server.tools import ServerTools

    models = {served.name: None} | {adapter: adapter for adapter in served.settings.adapters}
    chat_format, media = served.tokenizer.chat_format, served.media
    own = {"temp": API_SAMPLING.temp, "top-p": API_SAMPLING.top_p, "max-tokens": 0} | advised(chat_format.name)
    service = Service(
        supervisor, served.tokenizer, models, served.vocabulary, args.timeout,
        args.max_tokens or int(own["max-tokens"]) or None, grammars, served.kind, args.context_overflow,
        sampling=replace(API_SAMPLING, temp=own["temp"], top_p=own["top-p"]), thinks=chat_format.reasons,
        media=None if media is None else MediaReader(media),
    )  # fmt: skip
    hosts = None if key is not None and not is_loopback(args.host) else (*LOOPBACK_NAMES, args.host.lower())
    bodies = Bodies(BODY_BYTES if media is None else MEDIA_BODY_BYTES)
    return Guard(App(service, ServerTools(toolbox)).starlette(), key, hosts, tuple(args.allowed_origins), bodies)


def _adapters(folder: str | None) -> dict[str, str]:
    """The adapters in a folder: name -> path. Links to folders elsewhere are skipped.

    Raises:
        RequestError: the folder does not exist, or contains no adapter.
    """
    if folder is None:
        return {}
    root = Path(os.path.expanduser(folder)).resolve()
    if not root.is_dir():
        raise RequestError(f"{folder} is not a folder; --adapters takes one that contains a folder for each adapter")
    found = (path.resolve() for path in sorted(root.iterdir()) if (path / "adapter_config.json").is_file())
    adapters = {path.name: str(path) for path in found if path.parent == root}
    if not adapters:
        raise RequestError(f"{folder} contains no folder with an adapter_config.json; --adapters takes one that does")
    return adapters


if __name__ == "__main__":
    sys.exit(main())
