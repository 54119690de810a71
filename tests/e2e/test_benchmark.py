"""`python -m phi4_mlx benchmark` as a subprocess, on the embedded package."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SMALL = ["--model", "demo", "--prompt-tokens", "16", "300", "--generation-tokens", "4", "--repeats", "2"]


def benchmark(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "phi4_mlx", "benchmark", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == code, done.stderr
    return done


def test_json_is_one_line_and_progress_goes_to_stderr() -> None:
    done = benchmark(*SMALL, "--bandwidth", "20", "--json")
    assert done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    assert (report["model"], report["bandwidth_gb_per_s"], report["kv_bits"]) == ("demo", 20.0, None)
    assert report["weights_bytes"] > 10**6
    assert [row["prompt_tokens"] for row in report["lengths"]] == [16, 300]
    for row in report["lengths"]:
        assert row["kv_bytes_per_token"] == 2 * 4 * 64 * 4  # keys and values, 4 layers, one head of 64, float32
        assert row["prefill_tokens_per_s"] == pytest.approx(row["prompt_tokens"] / row["time_to_first_token_s"])
        read = report["weights_bytes"] + row["kv_bytes_per_token"] * (row["prompt_tokens"] + 2)
        assert row["share_of_ceiling"] == pytest.approx(row["decode_tokens_per_s"] * read / 20e9)
        assert row["peak_bytes"] > report["weights_bytes"]
    assert done.stderr.count("\n") == 4 and "300 tokens, run 2 of 2" in done.stderr


def test_the_table_and_a_quantised_cache() -> None:
    done = benchmark(*SMALL, "--kv-bits", "4")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("demo on ") and len(lines) == 7
    assert "320 bytes of keys and values a token" in lines[1]  # 4 bits, and 1 for a scale and a bias in each group
    assert [line.split()[0] for line in lines[-2:]] == ["16", "300"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "demo", "--prompt-tokens", "4000"], "--prompt-tokens 4000 and --generation-tokens 128 come to"),
        (["--model", "demo", "--prompt-tokens", "0"], "'0' is not a whole number from 1"),
        (["--model", "demo", "--generation-tokens", "1"], "'1' is not a whole number from 2"),
        (["--model", "demo", "--bandwidth", "0"], "'0' is not a number from 0.001"),
        (["--model", "nowhere"], "neither a folder nor a Hub id"),
    ],
)
def test_a_user_error_is_one_line(options: list[str], message: str) -> None:
    done = benchmark(*options, code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert message in done.stderr
