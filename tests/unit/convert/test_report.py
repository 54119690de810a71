"""quantization.json and its picture."""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi4_mlx.convert.bits import Candidate, choose_bits
from phi4_mlx.convert.quantize import Scheme
from phi4_mlx.convert.report import Report, kind_of, layer_of, write_report

SIZES = {
    "self_attn.qkv_proj": 96 * 64,
    "self_attn.o_proj": 64 * 64,
    "mlp.gate_up_proj": 256 * 64,
    "mlp.down_proj": 8192,
}


def report(
    layers: int = 3, bits_per_weight: float = 4.5, kl: Callable[[int], float] = lambda bits: 4.0**-bits
) -> Report:
    numbers = {"model.embed_tokens": 512 * 64}
    numbers |= {f"model.layers.{n}.{kind}": size for n in range(layers) for kind, size in SIZES.items()}
    measured = {
        path: [
            Candidate(path, Scheme("affine", bits, 64), size, kl(bits) * (n + 1), 0.5 * 4.0**-bits)
            for bits in (3, 4, 5, 6, 8)
        ]
        for n, (path, size) in enumerate(numbers.items())
    }
    chosen = choose_bits(measured, bits_per_weight)
    return Report(chosen, measured, bits_per_weight, "data.jsonl", "ab" * 32, 5000, 12.34, 10**9, 0.0125)


def test_the_report_states_every_matrix_the_totals_and_the_calibration(tmp_path: Path) -> None:
    made = report()
    json_file, _ = write_report(tmp_path, made)
    found = json.loads(json_file.read_text())
    assert json_file.name == "quantization.json"
    assert list(found["matrices"]) == list(made.chosen)
    assert found["bytes"] == sum(each["bytes"] for each in found["matrices"].values())
    assert found["bits_per_weight"] <= found["budget_bits_per_weight"] == 4.5
    assert found["calibration"] == {"data": "data.jsonl", "sha256": "ab" * 32, "tokens": 5000}
    assert found["seconds"] == 12.3 and found["peak_bytes"] == 10**9
    kls = found["kl_nats_per_token"]
    assert kls["measured"] == 0.0125
    assert math.isclose(kls["sum_of_matrices"], sum(each["kl_nats_per_token"] for each in found["matrices"].values()))
    for path, entry in found["matrices"].items():
        assert entry["numbers"] == made.chosen[path].numbers and entry["group_size"] == 64
        (own,) = [each for each in entry["candidates"] if each["bits"] == entry["bits"]]
        assert own.items() <= entry.items()
        assert len(entry["candidates"]) == 5


@pytest.mark.parametrize("made", [report(0), report(1, 3.5, lambda bits: 0.0)])
def test_the_picture_is_drawn_the_same_each_time(made: Report, tmp_path: Path) -> None:
    pictures = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _, picture = write_report(tmp_path / name, made)
        pictures.append(picture.read_bytes())
        with Image.open(picture) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(maxcolors=2**20) or []) > 20
    assert pictures[0] == pictures[1]


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert [path.name for path in write_report(tmp_path, report())] == ["quantization.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["quantization.json"]


def test_a_path_is_a_kind_and_a_layer() -> None:
    assert kind_of("model.layers.11.mlp.down_proj") == "mlp.down_proj"
    assert layer_of("model.layers.11.mlp.down_proj") == 11
    assert kind_of("model.embed_tokens") == "embed_tokens" and kind_of("lm_head") == "lm_head"
    assert layer_of("model.embed_tokens") is None
