"""The engine's side: a process that takes messages from the front, drives the engine, and sends each step's outputs.

Four threads: the engine's own, which also sends (one message a step); one that waits for messages; one that answers
operators; and the main one, which waits for the engine to end. Nothing here wakes up unless something has happened.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import zmq

from policies.collecting import settle
from runtime.engine import Engine, EngineDead
from runtime.sequence import Output
from runtime.serving import messages
from runtime.serving.commands import Hosted
from runtime.serving.messages import TokenOutput

logger = logging.getLogger(__name__)

LINGER_MS = 2_000
"""How long the last messages may take to leave when the process ends."""

Launch = Callable[[Callable[[], None]], AbstractContextManager[Hosted]]
"""Starts an engine that calls the given function once a step (`Engine.on_flush`). Pickled to get into the process."""


def run_engine_process(commands: str, outputs: str, launch: Launch) -> None:
    """The process's main function. `commands`, `outputs`: ZeroMQ addresses that the front has bound."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the front says what to do
    with zmq.Context() as context:
        inbound, outbound = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        for socket, address in ((inbound, commands), (outbound, outputs)):
            socket.set_hwm(0)
            socket.connect(address)
        outbox = Outbox(outbound)
        try:
            _serve(inbound, outbox, launch)
        except Exception as error:
            logger.debug("the engine process fails", exc_info=True)
            outbox.send(messages.Failed(" ".join(f"{error}".split()) or type(error).__name__))
        finally:
            inbound.close(linger=0)
            outbound.close(linger=LINGER_MS)


def _serve(inbound: zmq.Socket[bytes], outbox: Outbox, launch: Launch) -> None:
    with launch(outbox.flush) as hosted:
        engine = hosted.engine
        outbox.engine = engine
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may reach the whole group too; until now it ends the loading
        settle()
        outbox.send(messages.Ready(hosted.info))
        stopped, stop = os.pipe()
        with ThreadPoolExecutor(1, thread_name_prefix="replies") as replies:
            arguments = (inbound, stopped, outbox, hosted, replies)
            receiver = threading.Thread(target=_receive, args=arguments, name="receiver")
            receiver.start()
            engine.wait()
            os.write(stop, b".")
            receiver.join()
    try:
        engine.raise_if_dead()
    except EngineDead as dead:
        outbox.send(messages.Stopped(str(dead)))


class Outbox:
    """Collects what a step tells, and sends it as one message. `add` and `flush` are the engine thread's."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.engine: Engine | None = None
        self._socket = socket
        self._lock = threading.Lock()  # a socket is one thread's at a time
        self._outputs: list[TokenOutput] = []
        self._steps_sent = -1

    def add(self, output: Output) -> None:
        """An output of a request (`Engine.submit`'s on_output). That the engine has died is told once, by `Stopped`."""
        if output.finish_reason == "error" and self.engine is not None and self.engine.dead:
            return
        self._outputs.append(
            TokenOutput(
                output.request_id,
                output.token_ids,
                output.logprobs,
                output.finish_reason,
                output.stop_reason,
                output.error,
                output.num_cached_tokens,
            )
        )

    def flush(self) -> None:
        """Send what there is; a step without outputs too, for its figures."""
        if self.engine is None:
            return
        stats = self.engine.stats()
        if self._outputs or stats.num_steps != self._steps_sent or not stats.num_running:
            outputs, self._outputs = self._outputs, []
            self._steps_sent = stats.num_steps
            self.send(messages.StepOutputs(outputs, stats))

    def send(self, message: messages.FromEngine) -> None:
        """Hand a message to ZeroMQ, which queues it; from any thread."""
        data = messages.encode(message)
        with self._lock:
            self._socket.send(data)


def _receive(inbound: zmq.Socket[bytes], stopped: int, outbox: Outbox, hosted: Hosted, replies: Executor) -> None:
    """Take messages until the front says that it is over, or is gone, or `stopped` (a pipe) says that the engine is."""
    engine, parent = hosted.engine, multiprocessing.parent_process()
    poller = zmq.Poller()
    poller.register(inbound, zmq.POLLIN)
    poller.register(stopped, zmq.POLLIN)
    if parent is not None:
        poller.register(parent.sentinel, zmq.POLLIN)
    try:
        while True:
            ready = dict(poller.poll())
            if inbound not in ready:
                break  # the engine has stopped, or the front has died
            message = messages.decode_to_engine(inbound.recv())
            if isinstance(message, messages.Shutdown):
                break
            _handle(message, outbox, hosted, replies)
    except Exception:
        logger.exception("a message could not be taken; the engine stops")
    engine.close()


def _handle(message: messages.ToEngine, outbox: Outbox, hosted: Hosted, replies: Executor) -> None:
    engine = hosted.engine
    if isinstance(message, messages.Submit):
        _submit(message, outbox, engine)
    elif isinstance(message, messages.Cancel):
        for request_id in message.request_ids:
            engine.cancel(request_id)
    elif isinstance(message, messages.Stop):
        engine.stop(message.request_id, message.num_output_tokens)
    elif isinstance(message, messages.Ping):
        outbox.send(messages.Pong())
    elif isinstance(message, messages.Admin):
        call_id = message.call_id
        answered = hosted.run(message.command, message.arguments)
        answered.add_done_callback(lambda future: replies.submit(_reply, call_id, future, outbox))


def _reply(call_id: int, answered: Future[Any], outbox: Outbox) -> None:
    """Answer a command, on a thread of its own: what is long to encode must not delay a step."""
    try:
        outbox.send(messages.AdminReply(call_id, answered.result()))
    except Exception as error:
        outbox.send(messages.AdminReply(call_id, error=str(error) or type(error).__name__))


def _submit(message: messages.Submit, outbox: Outbox, engine: Engine) -> None:
    for k in range(message.params.n):
        request_id = message.first_id + k
        try:
            details = replace(message.details, continuation=k)
            engine.submit(message.token_ids, message.params, outbox.add, details, request_id)
        except EngineDead:
            return  # `Stopped` says so of everybody
        except ValueError as error:
            refused = TokenOutput(request_id, (), finish_reason="error", error=str(error))
            outbox.send(messages.StepOutputs([refused], engine.stats()))
