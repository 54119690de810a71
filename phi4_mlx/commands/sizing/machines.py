"""Macs and links as their makers and users describe them; nothing here has been measured by this package."""

from __future__ import annotations

from dataclasses import dataclass

from phi4_mlx.commands.benchmark import BANDWIDTHS

GB = 10**9

# The part of the two ceilings that a GPU reaches. Source: llama.cpp on an M1 Max, 46.2 tokens/s of a model of 4.92 GB
# (0.57 of 400 GB/s), github.com/brand-o/normiebench/issues/40; on an M1 Ultra, 2,142 prompt tokens/s of 3.21e9
# parameters (0.65 of its 21 TFLOPS), github.com/geerlingguy/ai-benchmarks/issues/48.
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
        """Metal's recommended working set: two thirds of up to 36 GB, three quarters of more.

        Source: logs with 32 GB (github.com/ollama/ollama, issue 434) and 64 GB (github.com/ggml-org/llama.cpp, 1870).
        """
        return self.memory_bytes * 2 // 3 if self.memory_bytes <= 36 * 2**30 else self.memory_bytes * 3 // 4

    @property
    def bytes_per_s(self) -> float:
        """Bytes a second that a decode step reads."""
        return BANDWIDTHS[self.chip] * GB * DECODE_SHARE


# Memory and ports: Apple's technical specifications. TFLOPS: github.com/huggingface/huggingface.js, pull requests 1044
# (M4, M4 Pro), 1304 (M3 Ultra, twice an M3 Max) and 2033 (M5, M5 Max).
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
    # Less than 50 us: jeffgeerling.com/blog/2025/15-tb-vram-on-mac-studio-rdma-over-thunderbolt-5. 3.5 GB/s:
    # github.com/ml-explore/mlx/issues/3207. macOS 26.2 and Thunderbolt 5: Apple's technical note TN3205.
    Link("Thunderbolt 5, JACCL", "jaccl", 50e-6, 3.5e9, thunderbolt=5),
    # 0.38 to 0.95 ms for a round trip: github.com/exo-explore/exo/issues/2295. The bandwidth of the same cable.
    Link("Thunderbolt 5, TCP", "ring", 0.4e-3, 3.5e9, thunderbolt=5),
    # 300 us over TCP: the first source above. 10 Gb/s: IEEE 802.3an.
    Link("10 GbE, TCP", "ring", 0.3e-3, 1.25e9),
    # 7.5 to 30 ms on average for a round trip under load: exo's issue 2295. 0.6 Gb/s: half of Wi-Fi 6 at 80 MHz, two
    # streams (1.2 Gb/s, IEEE 802.11ax).
    Link("Wi-Fi, TCP", "ring", 7.5e-3, 0.075e9),
)
