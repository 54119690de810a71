"""The lines that a command prints about a fusion."""

from __future__ import annotations

from collections import defaultdict

from phi4_mlx.errors import RequestError
from phi4_mlx.lora.fuse import Fused
from phi4_mlx.terminal.advice import command_line
from phi4_mlx.terminal.amount import amount, size

_SHOWN = 8  # paths of matrices on a line


def print_fused(save_path: str, fused: Fused, seconds: float) -> None:
    """Prints how much of an adapter's effect a package keeps.

    Args:
        save_path: the package.
        fused: the result of the fusion.
        seconds: that it took.

    Raises:
        RequestError: the package does not keep the effect.
    """
    print(
        f"{save_path}: {size(fused.package_bytes)} of weights, the base has {size(fused.base_bytes)}; {seconds:.1f} s"
    )
    print(
        f"{amount(len(fused.schemes), 'matrix', 'matrices')}: the adapter changes them by {fused.change:.2%} (relative "
        f"RMS); as stored, they are {fused.error:.2%} off"
    )
    for line in _bits(fused):
        print(line)
    effect = fused.effect
    own = f"{effect.own} of the data's prompts" if effect.own else "no prompt of the adapter's data, which is not here,"
    print(
        f"measured on {own} and {effect.prompts - effect.own} others: the adapter changes "
        f"{amount(effect.changed, 'answer')}; the package gives {effect.as_adapter} of these as the adapter does and "
        f"{effect.as_base} as the base does; {effect.kept:.1%} of the effect on probabilities is kept"
    )
    if not effect.keeps:
        raise RequestError(
            f"{save_path} is written, but does not keep the fine-tune (see above), though its fused matrices are "
            "not quantised; use the adapter with --adapter-path instead, or train it longer"
        )
    print(f"chat with it: {command_line('chat', model=save_path)}")


def _bits(fused: Fused) -> list[str]:
    """The bits of the fused matrices, a line for each kind, with the paths of those that the package stores in more."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for path, scheme in fused.schemes.items():
        kinds[f"in {scheme.bits} bits ({scheme.mode})" if scheme else "unquantised"].append(path)
    lines = []
    for kind, paths in kinds.items():
        raised = [path.removeprefix("model.") for path in paths if path in fused.raised]
        more = f" and {len(raised) - _SHOWN} more" if len(raised) > _SHOWN else ""
        names = f", more than in the base: {', '.join(raised[:_SHOWN])}{more}" if raised else ""
        lines.append(f"{amount(len(paths), 'matrix', 'matrices')} {kind}{names}")
    return lines
