"""Starting the dashboard."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

THEME = {
    "theme.light.primaryColor": "#0072B2",
    "theme.dark.primaryColor": "#56B4E9",
    "theme.light.backgroundColor": "#ffffff",
    "theme.dark.backgroundColor": "#101418",
    "theme.light.secondaryBackgroundColor": "#f3f5f8",
    "theme.dark.secondaryBackgroundColor": "#1b2129",
    "theme.light.textColor": "#1d2430",
    "theme.dark.textColor": "#e6e9ee",
}
"""What `dashboard.theme` cannot say from inside a page."""


def command(root: Path, port: int, host: str = "127.0.0.1") -> list[str]:
    """The command line that serves the dashboard. Raises ValueError for a folder or port that cannot be."""
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; give the one that holds your runs")
    if not 1 <= port <= 65535:
        raise ValueError(f"port must be 1 to 65535, not {port}")
    app = Path(__file__).with_name("app.py")
    options = {
        "server.address": host,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
        **THEME,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "streamlit", "run", str(app), *flags, "--", str(root.resolve())]


def launch(root: Path, port: int, host: str = "127.0.0.1") -> int:
    """Serve the dashboard for the runs in `root` until it is interrupted. Returns its exit status.

    Nobody is asked for a password: on another address than the default one, whoever reaches it reads the runs.
    Raises ValueError for a folder or port that cannot be.
    """
    process = subprocess.Popen(command(root, port, host))

    def stop(*_: object) -> None:
        process.terminate()

    # Whoever ends this process ends the server with it.
    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    try:
        return process.wait()
    except KeyboardInterrupt:
        stop()
        process.wait()
        return 0
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
