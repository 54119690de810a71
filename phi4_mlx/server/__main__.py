"""`python -m phi4_mlx.server --model M`: serves a model to programs and a browser; by default only on this machine."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.command import Parser, number, run, word
from phi4_mlx.terminal.limits import MAX_TOKENS_LIMIT
from phi4_mlx.terminal.options import add_model_options

if TYPE_CHECKING:
    from phi4_mlx.server.engine.supervisor import Supervisor
    from phi4_mlx.server.guard import Guard

PROG = "phi4-mlx server"
GRACE_S = 30  # for running answers after SIGTERM
KEY_VARIABLE = "PHI4_MLX_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run(_parser(), _serve, argv)


def _parser() -> Parser:
    parser = Parser(prog=PROG, description="Serve a model over HTTP: OpenAI's and Anthropic's APIs, and a chat page.")
    add_model_options(parser)
    parser.add_argument("--host", type=word, default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=number(int, 0, 65535), default=8080, help="0 takes a free port (default: 8080)")
    parser.add_argument(
        "--api-key",
        type=word,
        metavar="KEY",
        help=f"key that clients must send; {KEY_VARIABLE} sets it too, out of sight of `ps`",
    )
    parser.add_argument(
        "--adapters", type=word, metavar="FOLDER", help="folder of LoRA adapters that clients may name as the model"
    )
    parser.add_argument(
        "--allowed-origins",
        type=word,
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web pages that may send requests; * is any",
    )
    parser.add_argument(
        "--max-tokens",
        type=number(int, 1, MAX_TOKENS_LIMIT),
        help="longest answer where a client sets no limit (default: as long as fits)",
    )
    parser.add_argument(
        "--decode-concurrency", type=number(int, 1, 1024), default=32, help="answers generated at a time (default: 32)"
    )
    parser.add_argument(
        "--max-queue",
        type=number(int, 0, 100_000),
        default=256,
        metavar="N",
        help="requests that may wait (default: 256)",
    )
    parser.add_argument(
        "--timeout",
        type=number(float, 1.0, 86_400.0),
        default=600.0,
        metavar="S",
        help="seconds for an answer (default: 600)",
    )
    parser.add_argument(
        "--kv-cache-bytes", type=number(int, 2**20, 2**50), metavar="N", help="bytes for running answers"
    )
    parser.add_argument(
        "--prompt-cache-bytes", type=number(int, 0, 2**50), metavar="N", help="bytes for earlier prompts"
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")
    return parser


def _serve(args: argparse.Namespace) -> None:
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None

    from phi4_mlx.server.guard import is_loopback

    if key is None and not is_loopback(args.host):
        raise RequestError(
            f"--host {args.host} can be reached from other machines, so it needs --api-key (or {KEY_VARIABLE}); "
            "--host 127.0.0.1 does not"
        )
    with open_listener(args.host, args.port) as listener:  # first: a port in use fails before the model loads
        asyncio.run(_run(args, key, listener))


def open_listener(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        RequestError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only if the protocol is named; without it, small writes wait about 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise RequestError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from None
    return listener


async def _run(args: argparse.Namespace, key: str | None, listener: socket.socket) -> None:
    import uvicorn

    from phi4_mlx.server.guard import TimedProtocol
    from phi4_mlx.server.limits import HEADER_BYTES

    adapters = _adapters(args.adapters)
    supervisor, app = await _start(args, key, adapters)
    try:
        config = uvicorn.Config(
            app,
            http=TimedProtocol,
            ws="none",
            lifespan="off",
            log_level=args.log_level,
            access_log=args.log_level in ("debug", "info"),
            server_header=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=GRACE_S,
        )
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"{PROG}: listening on http://{shown}:{port}", file=sys.stderr, flush=True)
        # uvicorn raises the signal again after a clean shutdown, which would end the process with an error.
        signal.signal(signal.SIGTERM, lambda *_: None)
        await uvicorn.Server(config).serve(sockets=[listener])
    finally:
        await supervisor.stop()


async def _start(args: argparse.Namespace, key: str | None, adapters: dict[str, str]) -> tuple[Supervisor, Guard]:
    """Starts the engine; returns its supervisor and the ASGI application."""
    from phi4_mlx.checkpoint import load_config, load_tokenizer_and_format
    from phi4_mlx.files.manifest import verify_manifest
    from phi4_mlx.hub import DEFAULT_MODEL, resolve
    from phi4_mlx.server.app import App
    from phi4_mlx.server.engine.engine import Settings
    from phi4_mlx.server.engine.supervisor import Supervisor
    from phi4_mlx.server.guard import LOOPBACK_NAMES, Guard, is_loopback
    from phi4_mlx.server.service import Service

    name = DEFAULT_MODEL if args.model is None else args.model
    folder = resolve(name, args.revision)
    if args.verify:
        verify_manifest(folder)
    config = load_config(folder)
    tokenizer = load_tokenizer_and_format(folder, args.chat_format, config.model_type)
    shown = Path(name).name if Path(os.path.expanduser(name)).is_dir() else name
    if shown in adapters:
        raise RequestError(f"{args.adapters} has an adapter called {shown}, like the model; rename one of them")
    settings = Settings(
        str(folder),
        args.adapter_path,
        adapters,
        args.decode_concurrency,
        args.kv_cache_bytes,
        args.prompt_cache_bytes,
        args.chat_format,
    )
    supervisor = Supervisor(settings, args.decode_concurrency + args.max_queue)
    print(f"{PROG}: loading {shown}", file=sys.stderr, flush=True)
    await supervisor.start()
    models = {shown: None} | {adapter: adapter for adapter in adapters}
    service = Service(supervisor, tokenizer, models, config.vocab_size, args.timeout, args.max_tokens)
    service.grammars.start()
    hosts = None if key is not None and not is_loopback(args.host) else (*LOOPBACK_NAMES, args.host.lower())
    return supervisor, Guard(App(service).starlette(), key, hosts, tuple(args.allowed_origins))


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
