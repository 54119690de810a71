"""`python -m phi4_mlx.lora.export`: converts adapters to and from Hugging Face's PEFT."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from phi4_mlx.errors import RequestError
from phi4_mlx.terminal.advice import command_line
from phi4_mlx.terminal.command import Parser, run, typed, word


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


def from_peft(peft_path: str | Path, adapter_path: str | Path, model: str | Path | None = None) -> None:
    """Converts a PEFT folder to an adapter folder.

    Args:
        peft_path: PEFT's folder, in safetensors.
        adapter_path: the new folder; must not exist yet.
        model: the adapter's base, a folder or a Hub id; needed if the adapter leaves out layers, because the new
            folder counts them from the last one.

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
        config = load_config(resolve(model))
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
    parser = Parser(typed(command), "Convert an adapter to PEFT, or from it.")
    add = parser.add_argument
    add(
        "--adapter-path", type=word, default="adapters", metavar="FOLDER",
        help="the adapter; with --from-peft, the new folder",
    )  # fmt: skip
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--peft", type=word, metavar="OUT",
        help="write this PEFT folder (default: none; this or --from-peft is required)",
    )  # fmt: skip
    way.add_argument(
        "--from-peft", type=word, metavar="FOLDER",
        help="read this PEFT folder (default: none; this or --peft is required)",
    )  # fmt: skip
    add(
        "--model", type=word,
        help="with --from-peft: the adapter's base, needed if it leaves out layers (default: none)",
    )  # fmt: skip
    return parser


def _work(args: argparse.Namespace) -> None:
    if args.peft is None:
        from_peft(args.from_peft, args.adapter_path, args.model)
        from phi4_mlx.adapters.folder import read_config

        base = args.model or read_config(Path(os.path.expanduser(args.adapter_path))).get("model")
        command = command_line("chat", model=base, adapter_path=args.adapter_path)
        print(f"{args.adapter_path}: ready for --adapter-path; chat with it: {command}")
    elif args.model is not None:
        raise RequestError(f"--model {args.model} needs --from-peft; leave --model out")
    else:
        to_peft(args.adapter_path, args.peft)
        print(f"{args.peft}: ready for PEFT: PeftModel.from_pretrained(model, {args.peft!r})")


if __name__ == "__main__":
    raise SystemExit(main())
