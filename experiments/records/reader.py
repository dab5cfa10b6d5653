"""Reading a run's folder back, whole or as far as it came."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.records.earlier import with_squares, without_squares
from experiments.records.environment import KINDS
from experiments.records.schema import OPTIONAL, SCHEMAS, RunError, check_columns, filled, tables_of
from policies.registry import nearest


class Run:
    """A run's records. Tables are read when they are first asked for.

    Attributes:
        folder: where it lies.
        name: the folder's name.
        info: the content of run.json.
        complete: whether it was closed; otherwise the tables hold what was on disk when it died (or holds now).
    """

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self.info = info
        self.complete = not (folder / "parts").is_dir()
        self._tables: dict[str, pa.Table] = {}

    @property
    def kind(self) -> str:
        """`real`, `sim`, `replay` or `client`."""
        return str(self.info["kind"])

    @property
    def spec(self) -> dict[str, Any]:
        """The specification that gives this run again."""
        return dict(self.info.get("spec") or {})

    @property
    def limits(self) -> dict[str, Any]:
        """`policies.replica_state.Limits` as a dict."""
        return dict(self.info.get("limits") or {})

    @property
    def pools(self) -> list[dict[str, Any]]:
        """What run.json says of each pool of replicas: `name`, `role`, `replicas` (at the start), `limits`, `stack`,
        `cost`, ...; none where all replicas are alike."""
        return list(self.info.get("pools") or [])

    def limits_of(self, replica: int) -> dict[str, Any]:
        """The limits of one replica."""
        pool = self.pool_of(replica)
        return self.limits if pool is None else dict(pool["limits"])

    def pool_of(self, replica: int) -> dict[str, Any] | None:
        """The entry of `pools` of one replica; None where all are alike."""
        return self._pools_by_replica.get(replica)

    @cached_property
    def _pools_by_replica(self) -> dict[int, dict[str, Any]]:
        if not self.pools or "replicas" not in self.info["tables"]:
            return {}
        pools = {pool["name"]: pool for pool in self.pools}
        rows = self.columns("replicas", ["replica", "pool"]).to_pylist()
        return {row["replica"]: pools[row["pool"]] for row in rows if row["pool"] in pools}

    @property
    def clairvoyant(self) -> bool:
        """Whether a policy was told what a real system cannot know; shown with every result."""
        return bool(self.info.get("clairvoyant", False))

    @property
    def has_steps(self) -> bool:
        """Whether there is a record of the steps: not where a client measured a server from outside."""
        return self.kind != "client"

    @property
    def has_decisions(self) -> bool:
        """Whether decisions were recorded."""
        return "decisions" in self.info["tables"]

    @property
    def label(self) -> str:
        """Name and kind for tables and legends, with the label of clairvoyant and incomplete runs."""
        marks = [self.kind, *(["clairvoyant"] if self.clairvoyant else []), *([] if self.complete else ["incomplete"])]
        return f"{self.name} ({', '.join(marks)})"

    def table(self, table: str) -> pa.Table:
        """`requests`, `steps`, `decisions` or `client` as an Arrow table. Raises RunError where the run has none."""
        if table not in self._tables:
            self._tables[table] = _read_table(self, table)
        return self._tables[table]

    def columns(self, table: str, names: Sequence[str]) -> pa.Table:
        """Some columns of a table, read without the others: of a long run, its tables may not fit in memory."""
        if table in self._tables:
            return self._tables[table].select(names)
        return _read_table(self, table, names)

    def num_rows(self, table: str) -> int:
        """How many rows a table has, without its content."""
        return len(self.columns(table, [SCHEMAS[table].names[0]]))

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row a request, in order of their ends; every column but `block_keys`. Nullable integers are Int64."""
        return to_pandas(self.table("requests").drop_columns(["block_keys"]))

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row a call of plan(), in order. Raises RunError where `has_steps` is False."""
        return to_pandas(self.table("steps"))

    @cached_property
    def decisions(self) -> pd.DataFrame:
        """One row a decision, in order. Raises RunError where the run was recorded without them."""
        return to_pandas(self.table("decisions"))

    @cached_property
    def client(self) -> pd.DataFrame:
        """What only a client sees, one row a request, in order of their ends. Raises RunError in any other run."""
        return to_pandas(self.table("client"))

    def __repr__(self) -> str:
        return f"Run({self.label})"


def read_run(folder: str | Path) -> Run:
    """Open a run's folder.

    Raises RunError: no such folder, no run.json in it or one that cannot be read, or a table of it is missing. That a
    table's file is broken, or has other columns, is raised when it is first asked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        beside = [path.parent.name for path in folder.parent.glob("*/run.json")]
        raise RunError(f"there is no folder {folder}; {nearest(folder.name, beside)}".rstrip("; "))
    run = Run(folder, _read_info(folder / "run.json"))
    for table in run.info["tables"]:
        if run.complete and not (folder / f"{table}.parquet").is_file():
            raise RunError(f"{folder / f'{table}.parquet'} is missing; the run cannot be read without it")
    return run


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path.parent} holds no run: there is no run.json in it") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(info, dict) or info.get("kind") not in KINDS:
        raise RunError(f"{path} is no run's description: it needs a kind, one of {', '.join(KINDS)}")
    known = tables_of(info["kind"])
    tables = info.setdefault("tables", [table for table in known if table != "replicas"])
    if not isinstance(tables, list) or not set(known) - set(OPTIONAL) <= set(tables) <= set(known):
        raise RunError(f"{path} is no run's description: tables must be some of {', '.join(known)}")
    for entry in ("spec", "limits"):
        if not isinstance(info.get(entry, {}), dict):
            raise RunError(f"{path} is no run's description: {entry} must be a mapping")
    return info


def _read_table(run: Run, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    found = _read_parts(run, table, columns)
    if table == "steps" and columns is None and without_squares(found):
        decisions = run.table("decisions") if "decisions" in run.info["tables"] else None
        return with_squares(found, decisions)
    return found


def _read_parts(run: Run, table: str, columns: Sequence[str] | None) -> pa.Table:
    if table not in run.info["tables"]:
        why = "" if run.has_steps else ": a client measured it from outside, and sees requests alone"
        raise RunError(f"{run.folder} was recorded without {table}{why}")
    final = run.folder / f"{table}.parquet"
    if final.is_file():
        return _read_file(final, table, columns)
    try:
        parts = sorted((run.folder / "parts").glob(f"{table}-*.parquet"))
        tables = [_read_file(part, table, columns) for part in parts]
    except FileNotFoundError:  # the run was closed just now: its parts have become one file
        return _read_file(final, table, columns)
    return pa.concat_tables(tables) if tables else SCHEMAS[table].empty_table().select(columns or SCHEMAS[table].names)


def _read_file(path: Path, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    names = SCHEMAS[table].names if columns is None else columns
    try:
        with pq.ParquetFile(path.absolute()) as file:
            check_columns(str(path), table, file.schema_arrow)
            return filled(table, file.read(None if columns is None else list(columns))).select(names)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{path} is broken and cannot be read: {reason}") from error


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """Plain NumPy columns where nothing can be null; pandas' nullable integers where it can (no detour by floats)."""
    nullable = [f.name for f in table.schema if f.nullable and pa.types.is_integer(f.type)]
    plain = table.drop_columns(nullable).to_pandas()
    for name in nullable:
        plain[name] = table[name].to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    return plain[table.column_names]
