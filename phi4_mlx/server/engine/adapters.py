"""The adapters of jobs: most are mixed by row in one forward pass, some have a model of their own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from phi4_mlx.adapters.layers import put_adapter, read_adapter
from phi4_mlx.checkpoint import share_weights
from phi4_mlx.errors import Phi4Error, RequestError
from phi4_mlx.models.model import LanguageModel
from phi4_mlx.ranks.leader import LedModel

DEFAULT = "--adapter-path"  # the name of that option's adapter


class Adapted(NamedTuple):
    """A model, and the adapter by name that its rows use; None for none."""

    model: LanguageModel
    adapter: str | None


class JobAdapters:
    """The adapters that jobs name, each read at its first use.

    Those of the base are mixed by row in one forward pass. One that changes whole weights, or layers outside the
    blocks, has a model of its own over the other weights of the base.

    Args:
        base: the model without them.
        folders: name -> folder.
        default: the folder of the one of jobs that name none; None for the base alone.

    Raises:
        RequestError: a name is one of the model's own.
        Phi4Error: the default cannot be used.
    """

    _known: dict[str | None, Adapted]

    def __init__(self, base: LanguageModel, folders: dict[str, str], default: str | None):
        self._folders = folders
        if isinstance(base, LedModel):  # the ranks have read their shares of them at the start
            self._known = {None: Adapted(base, DEFAULT if default else None)}
            self._known |= {name: Adapted(base, name) for name in folders}
            return
        self._base = base = share_weights(base) if folders or default else base  # its own adapters by name stay its own
        if taken := [name for name in folders if base.adapters is not None and name in base.adapters.names]:
            raise RequestError(f"adapter {taken[0]!r} has the name of one of the model's own; choose another name")
        self._known = {None: Adapted(base, None)}
        if default:
            self._known[None] = self._load(DEFAULT, default)

    def get(self, name: str | None) -> Adapted:
        """The model for the adapter of that name, and the adapter's name on that model; `None` is the default.

        Raises:
            RequestError: the name is unknown, or the adapter cannot be used.
        """
        if name not in self._known:
            folder = self._folders.get(str(name))
            if folder is None:
                raise RequestError(f"adapter {name!r} is unknown; known are {', '.join(self._folders)}")
            try:
                self._known[name] = self._load(str(name), folder)
            except Phi4Error as error:  # clients know its name, not its folder
                why = str(error).replace(folder, str(name))
                raise RequestError(f"adapter {name!r} cannot be used: {why}") from None
        return self._known[name]

    def _load(self, name: str, folder: str) -> Adapted:
        adapter = read_adapter(Path(folder))
        if (bank := self._base.adapters) is not None and adapter.mixes:
            bank.add(name, adapter)
            try:
                bank.load(name)
            except BaseException:
                bank.remove(name)
                raise
            return Adapted(self._base, name)
        twin = share_weights(self._base)
        put_adapter(twin, adapter)
        return Adapted(twin, None)
