"""Model names resolved to folders, with downloads from the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from phi4_mlx.errors import CheckpointError, message_of
from phi4_mlx.files.manifest import MANIFEST_FILE
from phi4_mlx.terminal.suggestion import path_suggestion

DEFAULT_MODEL = "mlx-community/Phi-4-mini-instruct-4bit"

_PINNED = {DEFAULT_MODEL: "ac1c269cb4222a4e136a3d09edad301056c1f36a"}  # the commit of 2025-03-05

# The files that a checkpoint needs and a package passes on. Nothing else is downloaded, in particular no code.
NEEDED_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", MANIFEST_FILE,
    "LICENSE",
)  # fmt: skip


def resolve(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """Resolves a model name to a folder, downloading a Hub repository unless it is cached.

    Args:
        path_or_hf_repo: "demo", a folder, or a Hub id ("owner/name").
        revision: commit, branch or tag on the Hub; None for the main branch, or the pinned commit of the default model.

    Returns:
        The folder.

    Raises:
        CheckpointError: no such folder or Hub repository exists, or the Hub cannot be reached.
    """
    name = str(path_or_hf_repo)
    if name == "demo":
        return Path(__file__).parent / "demo"
    folder = Path(os.path.expanduser(name))  # leaves `~nobody` unchanged, where Path.expanduser raises
    if name and os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        return folder
    if isinstance(path_or_hf_repo, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise CheckpointError(f"{name!r:.200} is neither a folder nor a Hub id like {DEFAULT_MODEL!r}{_way_out(name)}")
    return _download(name, revision or _PINNED.get(name))


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    offline = constants.HF_HUB_OFFLINE
    try:
        reachable = not offline and _is_reachable(repo, revision)
        needed = list(NEEDED_FILES)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=needed, local_files_only=not reachable))
    except errors.RepositoryNotFoundError:  # also for gated repositories
        reason = "does not exist, or needs a login (`hf auth login`)"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}"
    except errors.HFValidationError:
        reason = "is not a valid Hub id"
    except errors.LocalEntryNotFoundError:
        reason = f"is not cached, and {'HF_HUB_OFFLINE is set' if offline else 'the Hub cannot be reached'}"
    except Exception as error:  # the Hub library's HTTP client and its exceptions differ by version
        reason = "could not be downloaded: " + message_of(error)
    raise CheckpointError(f"{repo} {reason}{_way_out(repo)}")


def _way_out(name: str) -> str:
    """The end of a message about a model that was not found: the names that may be meant, or the demo."""
    from huggingface_hub import constants

    known = {"demo", DEFAULT_MODEL}
    with contextlib.suppress(OSError):
        folders = (each.split("--") for each in os.listdir(constants.HF_HUB_CACHE))
        known |= {"/".join(words) for kind, *words in folders if kind == "models"}
    return path_suggestion(name, os.path.isdir, sorted(known - {name})) or "; --model demo needs no download"


def _is_reachable(repo: str, revision: str | None) -> bool:
    """Asks the Hub once: without a network a download would retry for half a minute before it fails."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().repo_info(repo, revision=revision, timeout=10)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise
    except Exception:  # no network, or no answer in time: the files may be cached
        return False
    return True
