"""Macs and links as their makers and users describe them; nothing here has been measured by this package."""

from __future__ import annotations

from dataclasses import dataclass

from phi4_mlx.commands.benchmark import BANDWIDTHS

GB = 10**9

# The part of the two ceilings that a GPU reaches; see SOURCES.
DECODE_SHARE = 0.57
PREFILL_SHARE = 0.65


@dataclass(frozen=True)
class Mac:
    """A machine.

    Attributes:
        name: as people call it.
        chip: a key of `BANDWIDTHS`.
        memory_bytes: unified memory.
        flops: float32 operations a second of its GPU.
        thunderbolt: the version of its ports.
    """

    name: str
    chip: str
    memory_bytes: int
    flops: float
    thunderbolt: int = 5

    @property
    def usable_bytes(self) -> int:
        """Metal's recommended working set: two thirds of up to 36 GB, three quarters of more; see `SOURCES`."""
        return self.memory_bytes * 2 // 3 if self.memory_bytes <= 36 * 2**30 else self.memory_bytes * 3 // 4

    @property
    def bytes_per_s(self) -> float:
        """Bytes a second that a decode step reads."""
        return BANDWIDTHS[self.chip] * GB * DECODE_SHARE


MACS = (
    Mac("MacBook Air M4, 16 GB", "Apple M4", 16 * 2**30, 4.6e12, thunderbolt=4),
    Mac("MacBook Pro M5, 32 GB", "Apple M5", 32 * 2**30, 5.7e12, thunderbolt=4),
    Mac("Mac mini M4 Pro, 64 GB", "Apple M4 Pro", 64 * 2**30, 9.2e12),
    Mac("MacBook Pro M5 Max, 128 GB", "Apple M5 Max", 128 * 2**30, 22.8e12),
    Mac("Mac Studio M3 Ultra, 256 GB", "Apple M3 Ultra", 256 * 2**30, 28.4e12),
)


@dataclass(frozen=True)
class Link:
    """A link between two machines.

    Attributes:
        name: as people call it.
        backend: of `mx.distributed`.
        latency_s: of one small exchange.
        bytes_per_s: of a large one, in each direction.
        thunderbolt: the least version of the ports that it needs; 0 for none.
    """

    name: str
    backend: str
    latency_s: float
    bytes_per_s: float
    thunderbolt: int = 0


LINKS = (
    Link("Thunderbolt 5, JACCL", "jaccl", 50e-6, 3.5e9, thunderbolt=5),
    Link("Thunderbolt 5, TCP", "ring", 0.4e-3, 3.5e9, thunderbolt=5),
    Link("10 GbE, TCP", "ring", 0.3e-3, 1.25e9),
    Link("Wi-Fi, TCP", "ring", 7.5e-3, 0.075e9),
)

SOURCES = (
    ("memory, bandwidth and ports of Macs", "Apple's technical specifications"),
    (
        "float32 rates of their GPUs",
        "github.com/huggingface/huggingface.js, pull requests 1044, 1304 (twice an M3 Max) and 2033",
    ),
    (
        "the part of the memory that a GPU may use",
        "github.com/ollama/ollama, issue 434; github.com/ggml-org/llama.cpp, issue 1870",
    ),
    (
        f"decode at {DECODE_SHARE} of the bandwidth",
        "llama.cpp, M1 Max, 46.2 tokens/s of 4.92 GB at 400 GB/s: github.com/brand-o/normiebench, issue 40",
    ),
    (
        f"prefill at {PREFILL_SHARE} of the float32 rate",
        "llama.cpp, M1 Ultra, 2,142 tokens/s of 3.21e9 weights at 21 TFLOPS: github.com/geerlingguy/ai-benchmarks, "
        "issue 48",
    ),
    (
        "JACCL, 0.05 ms; TCP over 10 GbE, 0.3 ms",
        "jeffgeerling.com/blog/2025/15-tb-vram-on-mac-studio-rdma-over-thunderbolt-5",
    ),
    ("TCP over Thunderbolt, 0.4 ms; Wi-Fi, 7.5 ms", "github.com/exo-explore/exo, issue 2295: the least of each"),
    ("Thunderbolt 5, 3.5 GB/s", "github.com/ml-explore/mlx, issue 3207"),
    ("JACCL from macOS 26.2 over Thunderbolt 5", "Apple's technical note TN3205"),
    ("10 GbE, 1.25 GB/s; Wi-Fi, 75 MB/s", "IEEE 802.3an; half of 802.11ax with 80 MHz and two streams"),
)
"""What the figures above and `BANDWIDTHS` follow from: (figure, source)."""
