"""What both ends of a link over TCP have in common: the keys that a shared token stands for.

The token is never sent. Each end derives both ends' CurveZMQ key pairs from it: who does not know the token knows
neither the public key of the engine, without which nothing can be said to it, nor the secret key of a front, which
the engine asks for. So every connection is authenticated both ways and encrypted.
"""

from __future__ import annotations

import hashlib
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils import z85

MIN_TOKEN = 16
"""Characters: whoever records a connection can try short tokens on it at leisure."""

HANDSHAKE_MS = 5_000

ADDRESS = "tcp://HOST:PORT"


def check_address(address: str) -> None:
    """Raises ValueError for what is not tcp://HOST:PORT."""
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not (address.startswith("tcp://") and host and colon and port.isdecimal() and int(port) < 2**16):
        raise ValueError(f"{address!r} is no address of an engine; write {ADDRESS}, as tcp://10.0.0.7:7000")


def key_pair(token: str, end: str) -> tuple[bytes, bytes]:
    """(public, secret) key of one end, `engine` or `front`. Raises ValueError for a token that is too short."""
    if len(token) < MIN_TOKEN:
        raise ValueError(f"a token has at least {MIN_TOKEN} characters; draw one with: openssl rand -hex 16")
    seed = hashlib.scrypt(token.encode(), salt=f"diptych {end}".encode(), n=2**14, r=8, p=1, dklen=32)
    secret = z85.encode(seed)
    return zmq.curve_public(secret), secret


def make_socket(context: zmq.asyncio.Context, token: str, end: str) -> zmq.asyncio.Socket:
    """A socket for one peer, with the keys of this end of the link."""
    socket: Any = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.linger = 0
    # No signs of life by ZeroMQ itself: with CURVE, its heartbeats make libzmq 4.3.5 lose frames now and then.
    socket.handshake_ivl = HANDSHAKE_MS
    socket.curve_publickey, socket.curve_secretkey = key_pair(token, end)
    return socket  # type: ignore[no-any-return]


def send(socket: zmq.asyncio.Socket, data: bytes) -> None:
    """Queue a frame. Never waits; without a peer it is dropped."""
    sent: Any = socket.send(data, zmq.NOBLOCK)  # a future, whatever its annotation says
    if sent.done():
        sent.exception()  # no peer: asked for, so that asyncio does not complain
