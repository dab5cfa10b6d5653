"""What an operator can have an engine do between two steps: each command by name, with its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from policies.control_plane import ControlPlane
from policies.stack import StackSpec
from runtime.engine import Engine
from runtime.serving.messages import EngineInfo
from runtime.serving.recent_rows import RecentRows


@dataclass(slots=True)
class Hosted:
    """An engine in its process, with what the commands need.

    `stack` names the policies as they are now; `rows` are the newest rows of the record, where they are kept.
    """

    engine: Engine
    info: EngineInfo
    stack: StackSpec
    seed: int = 0
    rows: RecentRows | None = None

    def run(self, command: str, arguments: Mapping[str, Any]) -> Future[Any]:
        """Have a command run before the next plan; its answer is plain values. ValueError for an unknown one."""
        commands = {
            "hold": self._hold,
            "release": self._release,
            "flush": self._flush,
            "change_policies": self._change_policies,
            "record": self._record,
        }
        if command not in commands:
            failed: Future[Any] = Future()
            failed.set_exception(ValueError(f"no command {command!r}; there are {', '.join(commands)}"))
            return failed
        return self.engine.call(lambda plane, now: commands[command](plane, now, arguments))

    def _hold(self, plane: ControlPlane, now: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        plane.hold(now)
        return {"before_step": plane.next_step}

    def _release(self, plane: ControlPlane, now: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        plane.release(now)
        return {"before_step": plane.next_step}

    def _flush(self, plane: ControlPlane, now: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"before_step": plane.next_step, "blocks": plane.flush(now)}

    def _change_policies(self, plane: ControlPlane, now: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`arguments`: role -> policy as text."""
        limits, offload = self.info.limits, arguments.get("offload", "never")
        if offload != "never" and not (limits.num_host_blocks and limits.prefix_caching):
            raise ValueError(
                f"offload: {offload} keeps prefixes in host memory, and this engine has none for them; start it with "
                "--host-memory GIB and prefix caching"
            )
        stack, policies = self.stack.rebuilt(arguments, block_size=limits.block_size, seed=self.seed)
        plane.change_policies(policies, {role: stack.as_dict()[role] for role in arguments}, now)
        self.stack = stack
        return {"before_step": plane.next_step, "stack": stack.as_dict()}

    def _record(self, plane: ControlPlane, now: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`arguments`: table, since_step, limit."""
        if self.rows is None:
            raise ValueError("no record is kept; start the server with --admin")
        rows = self.rows.of(arguments["table"], arguments["since_step"], arguments["limit"])
        return {"next_step": plane.next_step, **rows}
