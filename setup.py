"""Metadata and packages; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION_FILE = HERE / "phi4_mlx" / "terminal" / "version.py"  # read: a build need not have it on its path

setup(
    name="phi4-mlx",
    version=re.findall(r'^__version__ = "(.+)"$', VERSION_FILE.read_text(encoding="utf-8"), re.M)[0],
    description="The Phi-4-mini family on Apple MLX: chat, serve, fine-tune and convert, exact at every context length",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    author="the phi4_mlx authors",
    python_requires=">=3.10",
    # The converter is a top-level folder that installs inside the package: a top-level `convert` in site-packages
    # could clash with other packages.
    packages=[
        *find_packages(include=["phi4_mlx", "phi4_mlx.*"], exclude=["phi4_mlx.convert"]),
        "phi4_mlx.convert",
    ],
    package_dir={"phi4_mlx.convert": "convert"},
    package_data={
        "phi4_mlx": ["py.typed", "demo/*", "demo_flash/*", "demo_multimodal/*", "demo_multimodal/*/*"],
        "phi4_mlx.convert": ["calibration.jsonl"],
        "phi4_mlx.evaluation": ["suites/*/*"],
        "phi4_mlx.evaluation.languages": ["*.json"],
        "phi4_mlx.evaluation.long_context": ["languages/*.json"],
        "phi4_mlx.server": ["page/*", "page/*/*"],
    },
    install_requires=[
        'mlx>=0.32; sys_platform == "darwin"',
        'mlx[cpu]>=0.32; sys_platform == "linux"',
        "mlx-lm>=0.31",
        "numpy>=1.26",
        "pillow>=11.3",
        "soundfile>=0.13",
        "tiktoken>=0.9",
        "tokenizers>=0.21",
        "llguidance>=1.9",
        "huggingface_hub>=0.30",
        "rich>=13.7",
        "pygments>=2.13",
        "prompt_toolkit>=3.0.40",
        "pyyaml>=6",
        "python-multipart>=0.0.20",
        "starlette>=0.40",
        "uvicorn>=0.30",
    ],
    extras_require={
        "plots": ["matplotlib>=3.8"],
        "mcp": ["mcp>=2"],
        "pdf": ["pypdfium2>=4.30"],
        "record": ["sounddevice>=0.5"],
        "gguf": ["gguf>=0.19"],
        "interop": ["xllamacpp>=2026.10"],  # llama.cpp, for tests/e2e/test_llama_cpp.py
        # bfcl-eval, for the task bfcl, is installed without its dependencies, which no extra can say: see the Makefile.
        "eval": ["lm-eval>=0.4.13"],
        "dev": [
            "lm-eval>=0.4.13",
            "matplotlib>=3.8",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "mcp>=2",
            "pypdfium2>=4.30",
            "gguf>=0.19",
            "jsonschema>=4.20",
            "httpx>=0.27",
            "openai>=3",
            "anthropic>=2",
            "pexpect>=4.9",
            "playwright>=1.50",
            "ruff>=0.17,<0.18",
            "mypy>=1.18,<3",
            "setuptools>=65",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["phi4-mlx=phi4_mlx.cli:main"]},
    classifiers=[
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
