"""Records made small, to be kept beside code: the same rows in a fraction of the bytes.

Whole numbers mostly count on from row to row and are stored as differences. Block keys, which nothing can compress, are
replaced by numbers: only which of them are equal decides anything on one replica, and so a replay of the copy takes the
same decisions.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.records.reader import Run, read_run
from experiments.records.schema import RunError

_LEVEL = 19


def write_compact(table: pa.Table, path: Path) -> None:
    """One Parquet file, as small as it gets."""
    differences = {field.name: "DELTA_BINARY_PACKED" for field in table.schema if pa.types.is_integer(field.type)}
    plain = [field.name for field in table.schema if field.name not in differences and not _nested(field.type)]
    unfinished = path.absolute().with_name(path.name + ".tmp")
    pq.write_table(
        table,
        unfinished,
        compression="zstd",
        compression_level=_LEVEL,
        use_dictionary=plain,
        column_encoding=differences,
        write_statistics=False,
    )
    unfinished.replace(path)


def compact_run(run: Run, folder: Path) -> Run:
    """A small copy of a complete run. Raises RunError for one that is not complete."""
    if not run.complete:
        raise RunError(f"{run.folder} was cut short; only a complete run is kept")
    folder.mkdir(parents=True, exist_ok=True)
    for name in run.info["tables"]:
        table = run.table(name)
        write_compact(_with_numbered_keys(table) if name == "requests" else table, folder / f"{name}.parquet")
    # Last, so that a folder with a description is whole.
    (folder / "run.json").write_text(json.dumps(run.info, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return read_run(folder)


def _nested(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_map(kind)


def _with_numbered_keys(table: pa.Table) -> pa.Table:
    """Block keys as numbers of four bytes, in order of their first appearance."""
    numbers: dict[bytes, bytes] = {}
    column = [
        [numbers.setdefault(key, len(numbers).to_bytes(4, "big")) for key in keys]
        for keys in table.column("block_keys").to_pylist()
    ]
    at = table.schema.get_field_index("block_keys")
    field = table.schema.field(at)
    return table.set_column(at, field, pa.array(column, field.type))
