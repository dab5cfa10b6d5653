"""Weights by name from the Hugging Face hub: safetensors and JSON only, one try, short timeouts."""

from __future__ import annotations

import re
from pathlib import Path

from runtime.model_config import ModelError

# Text and safetensors. Pickled weights are never fetched.
_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
_PROBE_TIMEOUT_S = 4.0


def looks_like_hub_id(source: str) -> bool:
    """Whether `source` has the form organisation/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not source.startswith(".")


def fetch(repo_id: str) -> Path:
    """The local folder of a hub model, downloaded unless the hub's cache has it whole.

    Honours HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT. Raises ModelError when the hub cannot be reached or
    refuses.
    """
    # Imported late: it is slow, and most loads do not need it.
    from huggingface_hub import HfApi, constants, snapshot_download

    cached = _cached(repo_id)
    if cached is not None:
        return cached
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{repo_id} is not in the local cache and HF_HUB_OFFLINE is set; unset it or give a folder")
    try:
        # The library retries a download that cannot connect; one plain question first finds that out quickly.
        HfApi().model_info(repo_id, timeout=_PROBE_TIMEOUT_S)
        return Path(snapshot_download(repo_id, allow_patterns=_PATTERNS, etag_timeout=_PROBE_TIMEOUT_S))
    except Exception as error:  # the library lets its HTTP client's own exceptions through
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot fetch {repo_id} from the Hugging Face hub ({reason}); give a local folder") from error


def _cached(repo_id: str) -> Path | None:
    """The cached folder if all it needs is there; a download cut short leaves a partial one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from runtime.weights.safetensors import weight_files

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=_PATTERNS, local_files_only=True))
        weight_files(folder)
    except (LocalEntryNotFoundError, ModelError):
        return None
    complete = (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    return folder if complete else None
