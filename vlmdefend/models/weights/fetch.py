"""Fetches files from the Hugging Face hub: from the local cache first, then from the network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlmdefend.errors import UserError

SECONDS_TO_CONNECT = 5


class DownloadError(UserError):
    """Weights that are neither in the cache nor can be downloaded."""


class Repository(NamedTuple):
    """A model's repository on the hub, with the command by which a user would fetch it."""

    model: str  # the name as the user gave it
    repo: str  # "org/name"
    command: str  # one line of Python that downloads it

    def file(self, names: Sequence[str], cache_dir: str | Path | None = None) -> Path:
        """Returns the first of ``names`` that is cached, else the first that can be downloaded.

        What is cached is used as it is: without a question to the network, and so the same on every run.

        Raises:
            Unobtainable: names the cache folder, the command that fetches the model, and what works without.
        """
        for name in names:
            cached = self._cached(name, cache_dir)
            if cached:
                return cached
        reason = _offline()
        if reason is None:
            found = self._download(names, cache_dir)
            if isinstance(found, Path):
                return found
            reason = found
        raise DownloadError(
            f"the weights of {self.model} are not in {cache_folder(cache_dir)} and cannot be downloaded ({reason}): "
            f'run `python -c "{self.command}"` where there is a network and copy that folder here, give a local '
            "file with --weights FILE, or use the embedded tiny-vit or tiny-rn, which need no download."
        )

    def _cached(self, name: str, cache_dir: str | Path | None) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, cache_dir=cache_dir)
        return Path(found) if isinstance(found, str) and Path(found).is_file() else None

    def _download(self, names: Sequence[str], cache_dir: str | Path | None) -> Path | str:
        """Returns the file, or the reason why there is none."""
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download

        for name in names:
            try:
                return Path(hf_hub_download(self.repo, name, cache_dir=cache_dir))
            except hub.LocalEntryNotFoundError:
                return "the connection broke"
            except hub.EntryNotFoundError:
                continue
            except hub.GatedRepoError:
                return f"{self.repo} is gated: ask for access on its page and log in with `hf auth login`"
            except hub.RepositoryNotFoundError:
                return f"the hub has no public repository {self.repo}"
            except Exception as error:  # the many faces of a failed download
                return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".rstrip(".: ")
        return f"{self.repo} has no {' or '.join(names)}"


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Returns the folder that downloads are kept in."""
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser()


def _offline() -> str | None:
    """Returns why the hub cannot be reached, within seconds; None if it can.

    Called once before a download, which by itself retries for most of a minute.
    """
    from huggingface_hub import constants, utils

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_CONNECT)  # type: ignore[attr-defined]
    except Exception:  # requests or httpx, by the version of the hub's client
        return "no connection to the hub"
    return None
