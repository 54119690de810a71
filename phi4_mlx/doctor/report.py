"""The report: its JSON, and its lines for people. It has no paths, and no names of users or hosts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypedDict

from phi4_mlx.doctor.outcome import Outcome
from phi4_mlx.models.safe import TWINS, VARIABLE
from phi4_mlx.terminal.amount import amount, size

if TYPE_CHECKING:
    from phi4_mlx.doctor.machine import Fit, Machine
    from phi4_mlx.doctor.speed import Speed

FORMAT = 1  # of the JSON


class Report(TypedDict):
    """The JSON of `--json`.

    Attributes:
        format: `FORMAT`.
        machine: versions and hardware.
        fits: the models of the family, and the longest context of each.
        checks: the outcome of each check.
        not_compared: what this machine cannot show, in words.
        speed: measurements, up to one that died.
        seconds: that all took.
        passed: True if every check passed.
        switch_off: the fast paths to switch off.
        verdict: the last line.
    """

    format: int
    machine: Machine
    fits: list[Fit]
    checks: list[Outcome]
    not_compared: list[str]
    speed: list[Speed]
    seconds: float
    passed: bool
    switch_off: list[str]
    verdict: str


def verdict(checks: Sequence[Outcome]) -> tuple[list[str], str]:
    """The fast paths to switch off, and the last line of the report."""
    failed = [check for check in checks if not check["passed"]]
    if not failed:
        return [], f"all {amount(sum(map(_compared, checks)), 'check')} passed"
    paths = sorted({path for check in failed for path in check["switch_off"]})
    helpless = [check["name"] for check in failed if not check["switch_off"]]
    parts = [f"{len(failed)} of {amount(len(checks), 'check')} failed"]
    if paths:
        parts.append(f"switch off with {VARIABLE}={','.join(paths)}")
    if helpless:
        parts.append(f"no switch helps {'; '.join(helpless)}: report it with --json")
    return paths, "; ".join(parts)


def not_compared(machine: Machine) -> list[str]:
    """What this machine cannot show."""
    found = []
    if len(machine["devices"]) == 1:
        found.append(
            f"MLX has one device here, the {machine['devices'][0]}: no GPU was compared with it, only each fast path "
            "with its slow twin"
        )
    if not str(machine["versions"]["system"]).startswith("macOS"):
        found.append("weights are wired on macOS alone, so that path was not taken")
    if machine["switched_off"]:
        found.append(f"{VARIABLE} has switched off {', '.join(machine['switched_off'])}, which were not compared")
    return found


def machine_lines(machine: Machine) -> Iterator[str]:
    """The machine and its versions."""
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in machine["versions"].items())
    yield versions
    limit = machine["wired_limit_mb"]
    wired = "" if limit is None else f", wired limit {'of the system' if not limit else size(limit * 2**20)}"
    yield (
        f"{machine['chip']}, {' and '.join(machine['devices'])}, memory {size(machine['memory_bytes'])}, of which MLX "
        f"may use {size(machine['limit_bytes'])}{wired}"
    )


def fit_lines(fits: Sequence[Fit]) -> Iterator[str]:
    """The models that fit, with the longest context of each."""
    bits = list(dict.fromkeys(each for fit in fits for each in fit["longest"]))
    yield f"{'in 4 bits':46} {'weights':>8}  longest context, keys and values in {', '.join(bits)} bits"
    for fit in fits:
        cells = [f"{fit['longest'][each]:>9,}" if each in fit["longest"] else f"{'-':>9}" for each in bits]
        yield f"{fit['model']:46} {size(fit['weights_bytes']):>8} {' '.join(cells)}"


def check_head(devices: Sequence[str]) -> str:
    """The head of the table of checks."""
    across = f"{devices[-1]} to {devices[0]}" if len(devices) > 1 else ""
    return f"{'':4} {'check':46} {across:>10} {'to twin':>8} {'allowed':>8}"


def _compared(check: Outcome) -> bool:
    """False for a check that passed without a second device or a twin to compare with."""
    return not check["passed"] or (check["devices"], check["twins"]) != (None, None)


def check_line(check: Outcome) -> str:
    """A check on one line; one that failed names what to switch off."""
    figures = [("-" if value is None else f"{value:.1e}") for value in (check["devices"], check["twins"])]
    mark = "FAIL" if not check["passed"] else "ok" if _compared(check) else "-"
    line = f"{mark:4} {check['name']:46} {figures[0]:>10} {figures[1]:>8} {check['tolerance']:8.1e}"
    if check["passed"]:
        return line
    why = f"; {check['error']}" if check["error"] else ""
    paths = check["switch_off"]
    helps = f"{VARIABLE}={','.join(paths)} helps" if paths else "no switch helps"
    return f"{line}  {helps}{why}"


def speed_lines(speed: Sequence[Speed]) -> Iterator[str]:
    """The table of speeds."""
    yield f"{'speed':52} {'':>9} {'':9} {'of memory':>9}"
    for row in speed:
        share = "" if row["share"] is None else f"{row['share']:9.1%}"
        yield f"{row['name']:52} {row['value']:9,.1f} {row['unit']:9} {share}".rstrip()


def twin_lines(paths: Sequence[str]) -> Iterator[str]:
    """The slow twins of fast paths, in words."""
    yield from (f"{path}: {twin}" for path, twin in TWINS.items() if path in paths)
