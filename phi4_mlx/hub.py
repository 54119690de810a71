"""Model names resolved to folders: embedded packages, folders, and the Hugging Face Hub with its cache."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4_mlx.errors import CheckpointError, message_of
from phi4_mlx.files.embedded import EMBEDDED
from phi4_mlx.files.manifest import MANIFEST_FILE
from phi4_mlx.files.safetensors import TOWERS_FILE
from phi4_mlx.terminal.suggestion import path_suggestion, suggestion

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo, ModelInfo

DEFAULT_MODEL = "mlx-community/Phi-4-mini-instruct-4bit"

_PINNED = {DEFAULT_MODEL: "ac1c269cb4222a4e136a3d09edad301056c1f36a"}  # the commit of 2025-03-05

# The files that a checkpoint needs and a package passes on. Nothing else is downloaded, in particular no code.
NEEDED_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", TOWERS_FILE,
    "vision-lora/adapter*", "speech-lora/adapter*", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "preprocessor_config.json", MANIFEST_FILE,
    "LICENSE", "README.md",
)  # fmt: skip


def resolve(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """Resolves a model name to a folder, downloading a Hub repository unless it is cached.

    Args:
        path_or_hf_repo: "demo" or another name in `EMBEDDED`, a folder, or a Hub id ("owner/name").
        revision: commit, branch or tag on the Hub; None for the main branch, or the pinned commit of the default model.

    Returns:
        The folder.

    Raises:
        CheckpointError: no such folder or Hub repository exists, or the Hub cannot be reached.
    """
    name = str(path_or_hf_repo)
    if name in EMBEDDED:
        return EMBEDDED[name]
    folder = Path(os.path.expanduser(name))  # leaves `~nobody` unchanged, where Path.expanduser raises
    if name and os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        return folder
    if isinstance(path_or_hf_repo, Path):
        raise _unknown(name)
    return download(name, revision)


def download(repo: str, revision: str | None = None, files: Sequence[str] = NEEDED_FILES) -> Path:
    """Downloads files of a Hub repository, unless they are cached; in a terminal with a progress bar for each.

    Args:
        repo: the Hub id.
        revision: commit, branch or tag; None as for `resolve`.
        files: patterns of their names.

    Returns:
        The folder of the revision in the cache.

    Raises:
        CheckpointError: as for `resolve`.
    """
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", repo):
        raise _unknown(repo)
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    revision = revision or _PINNED.get(repo)
    try:
        info = None if constants.HF_HUB_OFFLINE else _ask(repo, revision)
        if info is not None:  # file by file, because Ctrl-C does not stop the threads of snapshot_download
            for name in (each.rfilename for each in info.siblings or ()):
                if any(fnmatchcase(name, pattern) for pattern in files):
                    hf_hub_download(repo, name, revision=info.sha)
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(files), local_files_only=info is None,
                tqdm_class=_no_bar(),
            )
        )  # fmt: skip
    except Exception as error:  # the Hub library's HTTP client and its exceptions differ by version
        raise CheckpointError(f"{repo} {why_not_downloaded(error, revision)}{_way_out(repo)}") from None


def why_not_downloaded(error: Exception, revision: str | None = None) -> str:
    """The reason why a download failed, to follow the repository's name.

    Args:
        error: from the Hub library.
        revision: the one that was asked for.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, errors.RepositoryNotFoundError):  # also for gated repositories
        return "does not exist, or needs a login (`hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}"
    if isinstance(error, errors.HFValidationError):
        return "is not a valid Hub id"
    if isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        offline = constants.HF_HUB_OFFLINE
        return f"is not cached, and {'HF_HUB_OFFLINE is set' if offline else 'the Hub cannot be reached'}"
    return f"could not be downloaded: {message_of(error)}"


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(f"{name!r:.200} is neither a folder nor a Hub id like {DEFAULT_MODEL!r}{_way_out(name)}")


def _way_out(name: str) -> str:
    """The end of a message about a model that was not found: the names that may be meant, or the demo."""
    known = {*EMBEDDED, DEFAULT_MODEL, *map(_name, _model_folders())}
    return path_suggestion(name, os.path.isdir, sorted(known - {name})) or "; --model demo needs no download"


def _ask(repo: str, revision: str | None) -> ModelInfo | None:
    """Asks the Hub once, as a download without a network would retry for half a minute; None without an answer."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().model_info(repo, revision=revision, timeout=10)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise
    except Exception:  # no network, or no answer in time: the files may be cached
        return None


def _no_bar() -> Any:
    """The class of a progress bar that shows nothing."""
    from huggingface_hub.utils.tqdm import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    return NoBar


@dataclass(frozen=True)
class CachedModel:
    """A revision of a model in the Hugging Face cache, or an embedded package.

    Attributes:
        name: the Hub id, or the name of an embedded package.
        revision: the commit; "" for an embedded package, and for a folder of the cache without a whole revision.
        refs: branches and tags that point to it.
        folder: of the revision, or else of the model.
        nbytes: of its files.
        total_bytes: of all revisions of the model, which share files.
        last_used: seconds since 1970; 0 if it is not known.
        interrupted: True if a download of the model was interrupted.
    """

    name: str
    revision: str
    refs: tuple[str, ...]
    folder: Path
    nbytes: int
    total_bytes: int
    last_used: float
    interrupted: bool


def cache_folder() -> Path:
    """The folder of the Hugging Face cache, which `HF_HUB_CACHE` or `HF_HOME` may name."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def cached_models() -> list[CachedModel]:
    """The models in the Hugging Face cache, by name, the newest revision first.

    Raises:
        CheckpointError: the cache cannot be read.
    """
    if not cache_folder().exists():
        return []
    found = {repo.repo_path.name: repo for repo in _scan().repos if repo.repo_type == "model"}
    models = []
    for path in _model_folders():
        blobs = [*(path / "blobs").glob("*")]
        interrupted = any(blob.name.endswith(".incomplete") for blob in blobs)
        repo = found.get(path.name)
        if repo is None or not repo.revisions:  # nothing whole, or damaged
            nbytes = sum(map(_nbytes, blobs))
            models.append(CachedModel(_name(path), "", (), path, nbytes, nbytes, 0, interrupted))
            continue
        for each in sorted(repo.revisions, key=lambda each: -each.last_modified):
            used = max((file.blob_last_accessed for file in each.files), default=0)
            models.append(
                CachedModel(
                    repo.repo_id, each.commit_hash, tuple(sorted(each.refs)), each.snapshot_path, each.size_on_disk,
                    repo.size_on_disk, used, interrupted,
                )
            )  # fmt: skip
    return models


def remove_cached(name: str) -> int:
    """Removes all revisions of a model from the Hugging Face cache.

    Args:
        name: the Hub id.

    Returns:
        The bytes that were freed.

    Raises:
        CheckpointError: the model is not in the cache, or cannot be removed.
    """
    paths = {_name(path): path for path in _model_folders()}
    if name not in paths:
        raise CheckpointError(f"{name!r:.200} is not in {cache_folder()}{suggestion(name, paths)}")
    path, info = paths[name], _scan()
    repos = [repo for repo in info.repos if repo.repo_path.name == path.name]
    known = {file.blob_path for repo in repos for each in repo.revisions for file in each.files}
    freed = sum(_nbytes(blob) for blob in (path / "blobs").glob("*") if blob not in known)
    for repo in repos:  # alone: another model, such as one that was renamed, may have the same commits
        plan = replace(info, repos=frozenset([repo])).delete_revisions(*(each.commit_hash for each in repo.revisions))
        freed += plan.expected_freed_size
        plan.execute()
    if path.exists():  # it has no revision, or a file could not be removed
        shutil.rmtree(path)
    return freed


def _scan() -> HFCacheInfo:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir(cache_folder())
    except (CacheNotFound, ValueError) as error:
        raise CheckpointError(f"{cache_folder()} cannot be read as a Hugging Face cache: {message_of(error)}") from None


def _model_folders() -> list[Path]:
    """The folders of models in the cache, damaged ones too."""
    return sorted(path for path in cache_folder().glob("models--?*") if path.is_dir())


def _name(path: Path) -> str:
    """The Hub id of a folder in the cache."""
    return path.name.removeprefix("models--").replace("--", "/")


def _nbytes(path: Path) -> int:
    """The size of a file in bytes; of a symbolic link, 0."""
    return 0 if path.is_symlink() else path.stat().st_size
