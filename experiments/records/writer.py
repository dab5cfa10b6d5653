"""Writing a run's records while it goes.

Rows are collected in memory. By row count, and by age in a thread of its own, they go to disk as whole Parquet files
in `parts/`, each under its name only once it is complete, so that a run that is killed keeps what it had. `close` joins
the parts into one file a table. Those depend on the rows alone: row groups have a fixed size, each is written at once.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.records.environment import KINDS
from experiments.records.schema import SCHEMAS, RunError, tables_of, to_table
from experiments.records.unfolding import Repeated, StepRows, decisions_table
from policies.records import DecodeSteps

Row = Sequence[object]

ROW_GROUP = {"requests": 4096, "steps": 65_536, "decisions": 131_072, "client": 4096, "replicas": 4096}
"""Rows of a row group in the final files. Requests carry their block keys: tens of kilobytes each for long prompts."""

PART_ROWS = {"requests": 2048, "steps": 65_536, "decisions": 131_072}
"""Rows at which a table is flushed, whatever its age."""

PACKED_AT = 2048
"""Decisions that wait as Python's objects, before they become Arrow's: as many as a processor's cache has room for."""


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises RunError where a folder holds a run that is not to be overwritten."""
    if (folder / "run.json").exists() and not overwrite:
        raise RunError(f"{folder} holds a run already; name another folder (-o NAME), or overwrite it (--overwrite)")


class RunWriter:
    """A `policies.contract.Recorder` that writes a run's folder.

    Args:
        folder: made if it is not there.
        info: the content of run.json (see `run_info`), written at once. JSON values only.
        overwrite: replace a run that the folder holds.
        decisions: False leaves decisions.parquet away. A client's run (`info["kind"]`) has neither steps nor decisions,
            and its requests come by `request_seen`.
        replicas: True writes replicas.parquet, from `replica_changed`.
        flush_seconds: age at which rows go to disk (None: only by row count).

    `close` makes the run complete. Used as a context manager, leaving by an exception keeps the parts instead: the
    run stays readable and counts as incomplete. Rows may come from any one thread at a time.

    Raises:
        RunError: the folder holds a run already, cannot be written, or a row does not fit `policies.records`.
    """

    def __init__(
        self,
        folder: str | Path,
        info: Mapping[str, Any],
        *,
        overwrite: bool = False,
        decisions: bool = True,
        replicas: bool = False,
        flush_seconds: float | None = 5.0,
    ) -> None:
        self.folder = Path(folder)
        left_out = {"decisions": not decisions, "replicas": not replicas}
        self.tables = [table for table in tables_of(str(info.get("kind"))) if not left_out.get(table)]
        text = _run_json(info, self.tables)
        self._parts = self.folder / "parts"
        self._make_folder(text, overwrite)
        self._requests: list[Row] = []
        self._steps = StepRows()
        self._step_tables: list[pa.Table] = []  # more than none for a moment, or where a write has failed
        self._decisions: list[Row | Repeated] = []
        self.decision = self._decisions.append if "decisions" in self.tables else _leave_out
        self._client: list[Row] = []
        self._replicas: list[Row] = []
        self._packed: list[pa.Table] = []  # decisions
        self._num_packed = 0
        self._pack_at = min(PACKED_AT, PART_ROWS["decisions"])
        self._num_requests = 0  # rows so far
        self._settled = 0  # leading request rows whose last step's row is here too
        self._written = 0  # request rows on disk
        self._part_numbers = dict.fromkeys(self.tables, 0)
        self._lock = threading.Lock()  # held while rows go to disk
        self._taking = threading.Lock()  # held while a step's row is taken
        self._failure: RunError | None = None
        self._closed = threading.Event()
        self._flusher: threading.Thread | None = None
        if flush_seconds is not None:
            self._flusher = threading.Thread(target=self._flush_by_age, args=(flush_seconds,), daemon=True)
            self._flusher.start()

    # The recorder

    decision: Callable[[Row], None]
    """A decision of a plan: kept, until the row of a step shows that many are."""

    def request(self, row: Row) -> None:
        """A request has ended."""
        self._check_open()
        self._requests.append(row)
        self._num_requests += 1
        if self._settled == self._num_requests - 1 and row[_FIRST_TOKEN] is None:
            self._settled += 1  # no step is needed to read it
        if self._settled - self._written >= PART_ROWS["requests"]:
            self.flush()

    def step(self, row: Row) -> None:
        """A step was reported, or a call of plan() planned nothing."""
        self._check_open()
        with self._taking:
            self._steps.add(row)
        self._came()

    def decode_steps(self, steps: DecodeSteps) -> None:
        """The decisions of steps that change nothing but counts, and that they were reported."""
        self._check_open()
        if "decisions" in self.tables:
            self._decisions.append(Repeated(steps.decision_rows(), len(steps.times)))
        with self._taking:
            self._steps.add_run(steps)
        self._came()

    def _came(self) -> None:
        """Rows of steps have come, and the decisions before them."""
        self._settled = self._num_requests
        if len(self._decisions) >= self._pack_at:
            with self._lock:
                self._pack_decisions()
        if self._steps.num_rows >= PART_ROWS["steps"] or self._num_packed >= PART_ROWS["decisions"]:
            self.flush()

    def _pack_decisions(self) -> None:
        """With the lock held: the decisions so far become Arrow's."""
        if count := len(self._decisions):
            packed = decisions_table(self._decisions[:count])
            del self._decisions[:count]  # not a new list: rows may be appended to this one meanwhile
            self._packed.append(packed)
            self._num_packed += len(packed)

    def replica_changed(self, time_ns: int, replica: int, pool: str, event: str) -> None:
        """A replica starts, serves, drains, stops or has failed."""
        self._replicas.append((time_ns, replica, pool, event))

    def request_seen(self, row: Row, client_row: Row) -> None:
        """A request of a client's run has ended, or the run has: its rows of requests and client.

        They go to disk by age alone: a load generator, which has no other thread, is not to wait for a file.
        """
        self._check_open()
        if self._failure is not None:
            raise self._failure
        self._client.append(client_row)
        self._requests.append(row)
        self._num_requests += 1
        self._settled = self._num_requests

    # Going to disk

    def flush(self) -> None:
        """Put every row so far on disk, but for requests that refer to a step still to be recorded."""
        with self._lock:
            self._flush(self._settled)

    def _flush(self, num_requests: int) -> None:
        if self._failure is not None:
            raise self._failure
        # Requests last: whoever reads the parts finds the steps that a request refers to. How many was read before the
        # steps are counted, so a step that comes in meanwhile makes no difference.
        self._pack_decisions()
        if self._packed:
            self._write_part("decisions", pa.concat_tables(self._packed).combine_chunks())
            self._packed, self._num_packed = [], 0
        with self._taking:
            steps, self._steps = self._steps, StepRows()
        if steps.num_rows:
            self._step_tables.append(steps.table())
        if self._step_tables:
            self._write_part("steps", pa.concat_tables(self._step_tables))
            self._step_tables = []
        for table, rows, count in (
            ("replicas", self._replicas, len(self._replicas)),
            ("client", self._client, len(self._client)),
            ("requests", self._requests, num_requests - self._written),
        ):
            if count:
                self._write_part(table, to_table(table, rows[:count]))
                del rows[:count]
        self._written = num_requests

    def _write_part(self, table: str, rows: pa.Table) -> None:
        path = self._parts / f"{table}-{self._part_numbers[table]:06d}.parquet"
        try:
            _write(path, table, iter([rows]), compression="lz4")
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
        self._part_numbers[table] += 1

    def _flush_by_age(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            try:
                self.flush()
            except Exception as error:  # raised in the thread that feeds us, with its next flush or on closing
                self._failure = error if isinstance(error, RunError) else RunError(f"{type(error).__name__}: {error}")
                return

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RunError(f"{self.folder} is closed; no more rows can be recorded")

    # The ends

    def close(self) -> None:
        """Write what is left, join the parts into the final files and remove them. A second call does nothing."""
        if self._stop():
            self._join()

    def abort(self) -> None:
        """Write what is left and leave the parts: the run is readable and incomplete."""
        self._stop()

    def _stop(self) -> bool:
        if self._closed.is_set():
            return False
        self._closed.set()
        if self._flusher is not None:
            self._flusher.join()
        with self._lock:
            self._flush(self._num_requests)
        return True

    def _join(self) -> None:
        for table in self.tables:
            path = self.folder / f"{table}.parquet"
            parts = [self._parts / f"{table}-{n:06d}.parquet" for n in range(self._part_numbers[table])]
            try:
                _write(path, table, _regrouped(parts, ROW_GROUP[table]), compression="zstd")
            except OSError as error:
                raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
        shutil.rmtree(self._parts)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _make_folder(self, text: str, overwrite: bool) -> None:
        folder = self.folder
        try:
            check_free(folder, overwrite)
            folder.mkdir(parents=True, exist_ok=True)
            for table in SCHEMAS:
                (folder / f"{table}.parquet").unlink(missing_ok=True)
            if self._parts.exists():
                shutil.rmtree(self._parts)
            self._parts.mkdir()
            unfinished = folder / "run.json.tmp"
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, folder / "run.json")
        except OSError as error:
            raise RunError(f"{folder} cannot be written: {error.strerror or error}") from error


_FIRST_TOKEN = SCHEMAS["requests"].names.index("first_token_ns")


def _leave_out(decision: Row) -> None:
    """Of a run without decisions."""


def _run_json(info: Mapping[str, Any], tables: list[str]) -> str:
    if info.get("kind") not in KINDS:
        raise RunError(f"run.json needs a kind, one of {', '.join(KINDS)}; got {info.get('kind')!r}")
    try:
        return json.dumps({**info, "tables": tables}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RunError(f"run.json can hold JSON values only: {error}") from error


def _write(path: Path, table: str, groups: Iterator[pa.Table], compression: str) -> None:
    """One row group a table; the file appears under its name once it is whole.

    No dictionaries: to look for repeated values takes longer than all else, and what is compressed is smaller without.
    """
    unfinished = path.absolute().with_name(path.name + ".tmp")  # pyarrow takes a relative one with a colon for a URI
    with pq.ParquetWriter(unfinished, SCHEMAS[table], compression=compression, use_dictionary=False) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=max(1, len(group)))
    os.replace(unfinished, path)


def _regrouped(parts: list[Path], size: int) -> Iterator[pa.Table]:
    """The rows of all parts in tables of `size` rows, the last one smaller. Memory: one of them and one part."""
    held: list[pa.Table] = []
    count = 0
    for part in parts:
        held.append(pq.ParquetFile(part.absolute()).read(use_threads=False))
        count += len(held[-1])
        while count >= size:
            rows = pa.concat_tables(held)
            yield rows.slice(0, size).combine_chunks()
            held, count = [rows.slice(size)], count - size
    if count:
        yield pa.concat_tables(held).combine_chunks()
