"""`plan`: predictions against shares that are loaded, what cannot be split, hosts, and the page of its tables."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from phi4_mlx.checkpoint import load
from phi4_mlx.cli import main
from phi4_mlx.commands.sizing.estimate import exchange_s, prefill_per_s, service_of, step_s
from phi4_mlx.commands.sizing.machines import LINKS, MACS, Link, Mac
from phi4_mlx.commands.sizing.shape import matrix_weights, read_shape
from phi4_mlx.commands.sizing.split import Split, split_of, whole
from phi4_mlx.generation.memory import plan_context
from phi4_mlx.models import sharding
from phi4_mlx.models.share import Holding, Share
from tests.conftest import DATA, TinyModel
from tests.kinds import WRITERS
from tests.sizing_page import PAGE, page

MINI = DATA / "phi-4-mini-instruct" / "config.json"


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize("kind", WRITERS)
def test_the_shape_of_a_folder_is_that_of_the_loaded_model(tmp_path: Path, kind: str) -> None:
    folder = WRITERS[kind](tmp_path / kind)
    model, _ = load(folder, lazy=True)
    shape = read_shape(folder)
    assert shape.weights_bytes == model.weights_bytes
    assert whole(shape).costs == (plan_context(model).cost,)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    alone = read_shape(folder)
    assert alone.from_config and not shape.from_config
    assert {name: info.shape for name, info in alone.infos.items()} == {
        n: info.shape for n, info in shape.infos.items()
    }


def test_a_config_alone_gives_the_shape_of_its_quantised_package(tmp_path: Path) -> None:
    config = json.loads(MINI.read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 64, "bits": 4}}))
    dense, quantised = read_shape(MINI), read_shape(tmp_path)
    # 3.836e9 weights: 2 bytes each, or 4 bits and a sixteenth of a byte for scale and bias.
    assert dense.weights_bytes == pytest.approx(3.836e9 * 2, rel=1e-3)
    assert quantised.weights_bytes == pytest.approx(3.836e9 * 4.5 / 8, rel=1e-3)
    assert matrix_weights(dense.model()) == matrix_weights(quantised.model()) == 32 * 3072 * (5120 + 3072 + 3 * 8192)


def test_a_rank_of_two_holds_about_half_and_a_step_has_two_sums_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(["--model", str(MINI), "--ranks", "2"], capsys)
    tensor, pipeline = found["splits"]
    for split in (tensor, pipeline):
        assert max(split["weights_bytes"]) <= 0.55 * found["weights_bytes"]
        assert split["longest_context"] > 0
    assert tensor["decode_step"] == {"exchanges": 2 * 32 + 2, "bytes": 65 * 3072 * 2 + 2 * 4 * 66}
    assert pipeline["decode_step"] == {"exchanges": 2, "bytes": 2 * 3072 * 2}
    assert sum(tensor["cache_token_bytes"]) == 32 * 2 * 8 * 128 * 2
    assert [each["parallel"] for each in found["chosen"]] == ["tensor", "pipeline"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--ranks", "3", "--parallel", "tensor", "--model", str(MINI)],
            "num_key_value_heads .* multiple of 3.*8; use --p",
        ),
        (
            ["--ranks", "2", "--parallel", "tensor", "--model", "demo"],
            "num_attention_heads .* has 3; use --parallel pipe",
        ),
        (["--ranks", "5", "--model", "demo"], "5 ranks cannot share 4 blocks"),
        (["--ranks", "1"], "'1' is not a whole number from 2"),
        (["--ranks", "2", "--hosts", "a,b"], "both --hosts and --ranks"),
        ([], "neither --hosts nor --ranks"),
        (["--hosts", "127.0.0.1"], "names 1 machine; name 2 to 64"),
        (["--hosts", "127.0.0.1,127.0.0.1"], "'127.0.0.1' twice"),
        (["--hosts", "127.0.0.1,"], "an empty name"),
        (["--hosts", "127.0.0.1,no.such.host.invalid"], "host 'no.such.host.invalid' has no address: .*--ranks"),
        (["--hosts", f"127.0.0.1,{'x' * 300}"], "has no address"),
        (["--ranks", "2", "--model", "/no/such/folder"], "/no/such/folder"),
        (["--ranks", "2", "--kv-bits", "4", "--model", "demo-flash"], "kv"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(line, refused(arguments, capsys))


def test_a_host_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        raise TimeoutError("timed out") if address[0] == "away" else ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    assert "host 'away' does not answer: timed out" in refused(["--hosts", "here,away", "--model", "demo"], capsys)
    assert answer(["--hosts", "here,me@there", "--model", "demo"], capsys)["splits"]


def test_tensor_is_offered_only_where_it_divides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "demo", "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert "tensor: tensor parallel over 2 ranks needs num_attention_heads" in out and "By tensor" not in out
    assert "over jaccl: --parallel pipeline" in out and "By pipeline" in out


def test_a_model_of_one_block_can_be_split_by_tensor_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = WRITERS["phi3"](tmp_path / "flat", num_hidden_layers=1)
    found = answer(["--model", str(folder), "--ranks", "2"], capsys)
    assert [each["parallel"] for each in found["splits"]] == ["tensor"]
    assert {each["parallel"] for each in found["chosen"]} == {"tensor"}
    assert "cannot share 1 block" in refused(["--model", str(folder), "--ranks", "2", "--parallel", "pipeline"], capsys)


def test_times_follow_from_bytes_and_links() -> None:
    shape = read_shape(MINI)
    alone, tensor = whole(shape), split_of(shape, "tensor", 2)
    mac, link = MACS[-1], Link("test", "ring", 1e-3, 1e9)
    assert step_s(alone, mac, None, 0) == pytest.approx(alone.weights_bytes[0] / mac.bytes_per_s)
    exchanges = tensor.exchanges(1)
    assert exchange_s(tensor, link, 1) == pytest.approx(66 * 1e-3 + exchanges.nbytes / 1e9)
    half = max(tensor.weights_bytes) / mac.bytes_per_s
    assert step_s(tensor, mac, link, 0) == pytest.approx(half + exchange_s(tensor, link, 1))
    assert step_s(tensor, mac, link, 4096) > step_s(tensor, mac, link, 0)
    weights = matrix_weights(shape.model())
    free = Link("free", "jaccl", 0, 1e30)
    assert prefill_per_s(tensor, mac, free, weights) == pytest.approx(2 * prefill_per_s(alone, mac, None, weights))
    assert service_of(alone, Mac("small", "Apple M4", 2**30, 1e12), weights) is None
    service = service_of(alone, mac, weights)
    assert service is not None and service.rows == 32
    assert service.user_bytes == whole(shape).costs[0].token_bytes * 1536  # 1,280 tokens and the next, in whole buffers


def test_a_sum_over_a_ring_of_four_takes_three_round_trips_and_over_jaccl_one() -> None:
    split = split_of(read_shape(MINI), "tensor", 4)
    crossing = split.exchanges(1)
    ring, mesh = (exchange_s(split, Link("test", backend, 1e-3, 1e9), 1) for backend in ("ring", "jaccl"))
    assert ring == pytest.approx(3 * 66e-3 + 1.5 * crossing.nbytes / 1e9)
    assert mesh == pytest.approx(66e-3 + crossing.nbytes / 1e9)


def test_links_to_jaccl_need_thunderbolt_5() -> None:
    assert all(link.thunderbolt == 5 for link in LINKS if link.backend == "jaccl")
    assert {mac.thunderbolt for mac in MACS} == {4, 5}


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_the_bytes_of_a_share_are_predicted(parallel: Any, tmp_path: Path) -> None:
    shape = read_shape(WRITERS["phi3"](tmp_path / "tiny"))
    found = sharding.share_plan(shape.config, shape.infos, parallel, 2)
    assert split_of(shape, parallel, 2).weights_bytes == tuple(found)


def test_the_exchanges_of_a_step_are_counted(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one process runs each exchange of tensor parallel, though nothing crosses."""
    model, seen = tiny_model(), {"sums": 0, "gathers": 0, "bytes": 0}
    group = mx.distributed.init()
    assert group.size() == 1

    def counted(kind: str, exchange: Any) -> Any:
        def count(array: mx.array, **options: Any) -> Any:
            seen[kind] += 1
            seen["bytes"] += array.nbytes
            return exchange(array, **options)

        return count

    monkeypatch.setattr(mx.distributed, "all_sum", counted("sums", mx.distributed.all_sum))
    monkeypatch.setattr(mx.distributed, "all_gather", counted("gathers", mx.distributed.all_gather))
    config = model.config
    sharding.join_ranks(model, Holding(config, {}, {}), Share("tensor", 0, 1), group)
    cache = model.make_cache()
    mx.disable_compile()  # else blocks share a trace
    try:
        hidden = model.hidden(cache.admit(mx.array([[1]])), cache)
        model.candidates(hidden)
    finally:
        mx.enable_compile()
    width = config.hidden_size * model.dtype.size
    split = Split("tensor", (0,), (), config.num_hidden_layers, width, 0)
    expected = split.exchanges(1)
    assert (seen["sums"] + seen["gathers"], seen["bytes"]) == (expected.count, expected.nbytes)
    assert seen["sums"] == 2 * config.num_hidden_layers + 1


def test_the_page_has_what_the_command_prints() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.sizing_page writes it anew"
