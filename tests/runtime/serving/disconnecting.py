"""A client of one request on a bare socket, which can go away whenever it likes."""

from __future__ import annotations

import json
import socket
from typing import Any

from tests.runtime.serving.running import PATIENCE, Running


class Client:
    """Sends a completions request and does not wait."""

    def __init__(self, server: Running, body: dict[str, Any], path: str = "/v1/completions") -> None:
        host, port = server.url.removeprefix("http://").split(":")
        content = json.dumps(body)
        key = server.http.headers.get("Authorization", "Bearer none")
        self._socket = socket.create_connection((host, int(port)), PATIENCE)
        self._socket.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nAuthorization: {key}\r\n"
            f"Connection: close\r\nContent-Length: {len(content.encode())}\r\n\r\n{content}".encode()
        )

    def read_some(self) -> bytes:
        """What has come, at least something."""
        return self._socket.recv(65_536)

    def status(self) -> int:
        """Waits for the end of the answer; its status."""
        return int(self.everything().split(b" ", 2)[1])

    def json(self) -> Any:
        """Waits for the end of the answer; its body."""
        return json.loads(self.everything().split(b"\r\n\r\n", 1)[1])

    def everything(self) -> bytes:
        """The whole answer, as it came."""
        with self._socket, self._socket.makefile("rb") as file:
            return file.read()

    def leave(self) -> None:
        """Close the connection."""
        self._socket.close()
