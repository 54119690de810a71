"""`phi4-mlx export` and `python -m phi4_mlx.lora.export`: models and adapters for other programs, and from PEFT."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.advice import command_line
from phi4_mlx.terminal.amount import size
from phi4_mlx.terminal.command import Idle, Parser, progress_bar, run, typed, word
from phi4_mlx.terminal.options import add_revision_option

FORMATS = ("gguf", "hf", "peft", "mlx")
TYPES = ("F16", "BF16", "Q8_0")  # of a GGUF file's matrices


def main(argv: Sequence[str] | None = None, command: str = "lora.export") -> int:
    """Runs the command, under the name that was typed; returns the exit code."""
    return run(_parser(command), _work, argv)


def to_peft(adapter_path: str | Path, peft_path: str | Path) -> None:
    """Converts an adapter folder to a PEFT folder.

    Args:
        adapter_path: the adapter, in mlx-lm's layout.
        peft_path: the new folder; must not exist yet.

    Raises:
        RequestError: the target exists or cannot be written, or PEFT does not have this kind of adapter.
        ConfigError, CheckpointError: the adapter is missing or damaged.
    """
    from phi4_mlx.adapters.folder import CONFIG_FILE, FULL, read_folder, write_config, write_tensors
    from phi4_mlx.adapters.peft import PEFT_FILE, peft_layout
    from phi4_mlx.adapters.quantized import dense
    from phi4_mlx.files.atomic import whole_or_absent

    adapter = dense(read_folder(Path(os.path.expanduser(adapter_path))))
    if adapter.kind == FULL:
        raise RequestError(f"{adapter.source} holds full weights, not an adapter; convert it with `{typed('fuse')}`")
    tensors, config = peft_layout(adapter)
    with whole_or_absent(Path(peft_path)) as out:
        write_tensors(out / PEFT_FILE, tensors)
        write_config(out / CONFIG_FILE, config)


def from_peft(
    peft_path: str | Path, adapter_path: str | Path, model: str | Path | None = None, revision: str | None = None
) -> None:
    """Converts a PEFT folder to an adapter folder.

    Args:
        peft_path: PEFT's folder, in safetensors.
        adapter_path: the new folder; must not exist yet.
        model: the adapter's base, a folder or a Hub id; needed if the adapter leaves out layers, because the new
            folder counts them from the last one.
        revision: a commit, branch or tag of the base's Hub repository.

    Raises:
        RequestError: the target exists or cannot be written, the adapter is of an unsupported kind or stored as
            pickle, or the model is needed.
        ConfigError, CheckpointError: the adapter is missing or damaged, or does not fit the model.
    """
    from phi4_mlx.adapters.folder import place, write_folder
    from phi4_mlx.adapters.layers import check_fit
    from phi4_mlx.adapters.peft import read_peft
    from phi4_mlx.checkpoint import empty_model, load_config
    from phi4_mlx.files.atomic import whole_or_absent
    from phi4_mlx.hub import resolve

    adapter = read_peft(Path(os.path.expanduser(peft_path)))
    layers = sorted({layer for layer, _ in map(place, adapter.paths) if layer >= 0})
    total_layers = len(layers)
    if model is not None:
        config = load_config(resolve(model, revision))
        check_fit(empty_model(config, {}), adapter)
        total_layers = config.num_hidden_layers
    elif adapter.only_layers is not None or layers != list(range(total_layers)):
        raise RequestError(
            f"{adapter.source} leaves out layers; name the model with --model, so that they can be counted from its "
            "last one"
        )
    base = {"model": adapter.base_model} if adapter.base_model else {}
    with whole_or_absent(Path(adapter_path)) as out:
        write_folder(out, adapter, total_layers, base)


def _parser(command: str = "lora.export") -> Parser:
    parser = Parser(typed(command), "Write a model or an adapter for another program, or convert an adapter from PEFT.")
    add = parser.add_argument
    add(
        "--model", type=word,
        help="the model, or with --from-peft the adapter's base, needed if it leaves out layers: a folder, a Hugging "
        "Face id or an embedded model (default: none)",
    )  # fmt: skip
    add(
        "--adapter-path", type=word, metavar="FOLDER",
        help="the adapter to merge or to convert; with --from-peft, the new folder (default: none; with --peft and "
        "--from-peft, adapters)",
    )  # fmt: skip
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--peft", type=word, metavar="OUT",
        help="as --format peft --output OUT (default: none; this, --from-peft or --format is required)",
    )  # fmt: skip
    way.add_argument(
        "--from-peft", type=word, metavar="FOLDER",
        help="read this PEFT folder (default: none; this, --peft or --format is required)",
    )  # fmt: skip
    way.add_argument(
        "--format", choices=FORMATS,
        help="gguf: model.gguf for llama.cpp, with a Modelfile for Ollama; hf: a dense folder for transformers and "
        "vLLM; peft: the adapter alone; mlx: a package, as fuse writes it (default: none; this, --peft or --from-peft "
        "is required)",
    )  # fmt: skip
    add("--output", type=word, metavar="OUT", help="with --format: the new folder (default: none)")
    add("--type", choices=TYPES, default="F16", help="with --format gguf: the numbers of the matrices")
    add(
        "--chat-format", type=word, metavar="NAME",
        help="with --format gguf: chat format of its templates (default: the one detected)",
    )  # fmt: skip
    add_revision_option(parser)
    parser.idle.append(Idle(("type", "chat_format"), lambda args: args.format != "gguf", "without --format gguf"))
    return parser


def _work(args: argparse.Namespace) -> None:
    if args.format is None:
        if args.output is not None:
            raise RequestError(f"--output {args.output} needs --format; choose one of {', '.join(FORMATS)}")
        args.adapter_path = args.adapter_path or "adapters"
        if args.peft is not None and args.model is not None:
            raise RequestError(f"--model {args.model} needs --from-peft; leave --model out")
        (_from_peft if args.peft is None else _to_peft)(args)
        return
    if args.output is None:
        raise RequestError(f"--format {args.format} needs --output, the new folder")
    if args.format == "peft":
        if args.adapter_path is None:
            raise RequestError("--format peft needs --adapter-path, the adapter to convert")
        args.peft = args.output
        _to_peft(args)
        return
    if args.model is None:
        raise RequestError(f"--format {args.format} needs --model")
    {"gguf": _gguf, "hf": _hf, "mlx": _mlx}[args.format](args)


def _from_peft(args: argparse.Namespace) -> None:
    from_peft(args.from_peft, args.adapter_path, args.model, args.revision)
    from phi4_mlx.adapters.folder import read_config

    base = args.model or read_config(Path(os.path.expanduser(args.adapter_path))).get("model")
    command = command_line("chat", model=base, adapter_path=args.adapter_path)
    print(f"{args.adapter_path}: ready for --adapter-path; chat with it: {command}")


def _to_peft(args: argparse.Namespace) -> None:
    if args.model is not None:
        _check_adapter(args)
    to_peft(args.adapter_path, args.peft)
    print(f"{args.peft}: ready for PEFT: PeftModel.from_pretrained(model, {args.peft!r})")


def _check_adapter(args: argparse.Namespace) -> None:
    """Raises CheckpointError if the adapter does not fit the model."""
    from phi4_mlx.adapters.layers import check_fit, read_adapter
    from phi4_mlx.checkpoint import empty_model, load_config
    from phi4_mlx.hub import resolve

    adapter = read_adapter(Path(os.path.expanduser(args.adapter_path)), lazy=True)
    check_fit(empty_model(load_config(resolve(args.model, args.revision)), {}), adapter)


def _gguf(args: argparse.Namespace) -> None:
    from phi4_mlx.export.gguf_file import GGUF_FILE, MODELFILE, write_gguf

    with progress_bar("exporting") as progress:
        exported = write_gguf(
            args.model, args.output, args.adapter_path, args.type, args.revision,
            chat_format=args.chat_format, progress=progress,
        )  # fmt: skip
    folder = Path(os.path.abspath(os.path.expanduser(args.output))).name.lower()
    name = re.sub(r"[^a-z0-9_.-]+", "-", folder).strip("_.-") or "model"
    file, recipe = (os.path.join(args.output, each) for each in (GGUF_FILE, MODELFILE))
    print(f"{file}: {size(exported.nbytes)}, {args.type}; run it: {shlex.join(['llama-cli', '-m', file])}")
    print(f"{recipe}: for Ollama: {shlex.join(['ollama', 'create', name, '-f', recipe])}")
    if exported.exact_context is None:
        return
    why = "note: llama.cpp chooses the RoPE table by the context that it allocates, not by the text"
    if exported.exact_context:
        print(
            f"{why}: with num_ctx {exported.exact_context} or less, as in the {MODELFILE}, answers are exact below "
            f"{exported.exact_context:,} tokens; longer conversations need a larger one, which uses the long table "
            "from the first token on"
        )
    else:
        print(f"{why}: no context is small enough for the short table of this model, so answers differ from those here")


def _hf(args: argparse.Namespace) -> None:
    from phi4_mlx.export.dense_folder import write_dense

    with progress_bar("exporting") as progress:
        boundary = write_dense(args.model, args.output, args.adapter_path, args.revision, progress=progress)
    limit = ["--max-model-len", str(boundary)] if boundary else []
    print(f"{args.output}: ready for transformers and vLLM: {shlex.join(['vllm', 'serve', args.output, *limit])}")
    if boundary:
        print(
            f"note: vLLM chooses the RoPE table by --max-model-len, not by the text: with {boundary} or less it is "
            "exact; a larger one uses the long table from the first token on"
        )


def _mlx(args: argparse.Namespace) -> None:
    begin = time.perf_counter()
    if args.adapter_path is None:
        from phi4_mlx.convert.package import convert

        with progress_bar("exporting") as progress:
            convert(args.model, args.output, revision=args.revision, progress=progress)
        print(f"{args.output}: {time.perf_counter() - begin:.1f} s; {command_line('chat', model=args.output)}")
        return
    from phi4_mlx.lora.fuse import fuse
    from phi4_mlx.lora.fuse_report import print_fused

    with progress_bar("exporting") as progress:
        fused = fuse(args.model, args.adapter_path, args.output, revision=args.revision, progress=progress)
    print_fused(args.output, fused, time.perf_counter() - begin)


if __name__ == "__main__":
    raise SystemExit(main())
