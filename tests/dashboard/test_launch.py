"""Starting the dashboard as a server of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dashboard.launch import command
from tests.dashboard.browser import free_port, healthy

LAUNCH = "import sys; from pathlib import Path; from dashboard.launch import launch; "
LAUNCH += "sys.exit(launch(Path(sys.argv[1]), int(sys.argv[2])))"


def test_the_server_answers_and_ends_with_the_process_that_launched_it(tmp_path: Path) -> None:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", LAUNCH, str(tmp_path), str(port)])
    try:
        for _ in range(600):
            if healthy(port) or process.poll() is not None:
                break
            time.sleep(0.1)
        assert healthy(port)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert not healthy(port)


def test_only_this_machine_is_served_and_nothing_is_reported(tmp_path: Path) -> None:
    words = command(tmp_path, 8501)
    assert "--server.address=127.0.0.1" in words
    assert "--browser.gatherUsageStats=false" in words
    assert "--server.headless=true" in words
    assert words[-2:] == ["--", str(tmp_path.resolve())]


def test_a_folder_or_port_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        command(tmp_path / "nowhere", 8501)
    with pytest.raises(ValueError, match="port"):
        command(tmp_path, 70000)
