"""Copies the page's JavaScript libraries out of their npm packages: `make vendor`, needs npm and a registry.

The files enter the repository unchanged, with the licence of every package they contain, and vendor.json says where
each came from. A test compares them with vendor.json, so a changed byte fails.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "phi4_mlx" / "server" / "page" / "vendor"  # on the wire
TESTS = Path(__file__).parent / "vendor"  # for tests alone


@dataclass(frozen=True)
class Package:
    """One npm package.

    Args:
        folder: where its files go.
        name: its name in the registry.
        version: its exact version.
        licence: the SPDX expression in its package.json.
        files: path in the package -> file name here.
        licences: path in the package -> file name here.
    """

    folder: Path
    name: str
    version: str
    licence: str
    files: dict[str, str]
    licences: dict[str, str]


def bundled(name: str, version: str, licence: str, path: str = "LICENSE") -> Package:
    """A package whose code is inside markdown-it's bundle: only its licence is copied."""
    return Package(PAGE, name, version, licence, {}, {path: f"{name}.LICENSE.txt"})


# KaTeX and DOMPurify as UMD: half the size of their ES modules, and an `import` of them sets a global just the same.
PACKAGES = [
    Package(
        PAGE, "markdown-it", "15.0.3", "MIT",
        {"dist/browser/markdown-it.esm.min.mjs": "markdown-it.js"}, {"LICENSE": "markdown-it.LICENSE.txt"},
    ),
    bundled("entities", "8.1.0", "BSD-2-Clause"),
    bundled("linkify-it", "6.1.0", "MIT"),
    bundled("mdurl", "2.1.0", "MIT"),
    bundled("punycode.js", "2.3.1", "MIT", "LICENSE-MIT.txt"),
    bundled("uc.micro", "3.0.0", "MIT", "LICENSE.txt"),
    Package(
        PAGE, "dompurify", "3.5.0", "(MPL-2.0 OR Apache-2.0)",
        {"dist/purify.min.js": "dompurify.js"}, {"LICENSE": "dompurify.LICENSE.txt"},
    ),
    Package(
        PAGE, "@highlightjs/cdn-assets", "11.12.0", "BSD-3-Clause",
        {"es/highlight.min.js": "highlight.js"}, {"LICENSE": "highlight.LICENSE.txt"},
    ),
    Package(
        PAGE, "katex", "0.19.1", "MIT",
        {"dist/katex.min.js": "katex.js"}, {"LICENSE": "katex.LICENSE.txt"},
    ),
    Package(
        TESTS, "axe-core", "4.14.1", "MPL-2.0",
        {"axe.min.js": "axe.js"},
        {"LICENSE": "axe.LICENSE.txt", "LICENSE-3RD-PARTY.txt": "axe.LICENSE-3RD-PARTY.txt"},
    ),
]  # fmt: skip


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def download(package: Package, folder: Path) -> tuple[Path, str]:
    """The package's tarball, and its integrity as the registry states it, which is checked."""
    words = ["npm", "pack", f"{package.name}@{package.version}", "--json", f"--pack-destination={folder}"]
    (told,) = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    tarball = folder / told["filename"]
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if integrity != told["integrity"]:
        raise SystemExit(f"{package.name}@{package.version}: the tarball has {integrity}, npm says {told['integrity']}")
    return tarball, integrity


def unpack(package: Package, tarball: Path) -> dict[str, bytes]:
    """The package's files and licences, by their names here."""
    with tarfile.open(tarball) as archive:

        def read(path: str) -> bytes:
            member = archive.extractfile(f"package/{path}")
            assert member is not None  # a regular file
            return member.read()

        licence = json.loads(read("package.json"))["license"]
        if licence != package.licence:
            raise SystemExit(f"{package.name}@{package.version} is under {licence}, not {package.licence}: look at it")
        return {name: read(path) for path, name in (package.files | package.licences).items()}


def main() -> None:
    entries: dict[Path, list[dict[str, object]]] = {PAGE: [], TESTS: []}
    with tempfile.TemporaryDirectory() as scratch:
        for package in PACKAGES:
            tarball, integrity = download(package, Path(scratch))
            files = unpack(package, tarball)
            package.folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                (package.folder / name).write_bytes(data)
            entries[package.folder].append(
                {
                    "name": package.name,
                    "version": package.version,
                    "licence": package.licence,
                    "integrity": integrity,
                    "files": {name: sha256(files[name]) for name in package.files.values()},
                    "licences": {name: sha256(files[name]) for name in package.licences.values()},
                }
            )
    for folder, listed in entries.items():
        (folder / "vendor.json").write_text(json.dumps(listed, indent=2) + "\n")


if __name__ == "__main__":
    main()
