"""The Arrow form of `policies.records`: types, rows to tables, and the check of what is read back."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from struct import Struct
from struct import error as StructError

import numpy as np
import pyarrow as pa

from policies import records

TABLES: dict[str, dict[str, str]] = {
    "requests": records.REQUESTS,
    "steps": records.STEPS,
    "decisions": records.DECISIONS,
}
"""Table name -> its columns and their types, as `policies.records` has them: what a panel writes."""

CLIENT: dict[str, str] = {
    "request_id": "int64",
    "due_ns": "int64",  # when it was to be sent; arrival_ns is when it was
    "chunk_ns": "list<int64>",  # when each chunk with output came
}
"""client.parquet, one row a request: what only a client sees, in place of the steps that it does not."""

CLIENT_TABLES: dict[str, dict[str, str]] = {"requests": records.REQUESTS, "client": CLIENT}
"""What a client of a server writes. There a request's status may also be `failed`, and its before_step is -1."""

CLUSTER_TABLES: dict[str, dict[str, str]] = {"replicas": records.REPLICAS}
"""What a simulation of a cluster writes beside those, where replicas differ or come and go."""

_TYPES = {
    "int64": pa.int64(),
    "int32": pa.int32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.string(),
    "list<int64>": pa.list_(pa.int64()),
    "list<binary>": pa.list_(pa.binary()),
    "map<string,float64>": pa.map_(pa.string(), pa.float64()),
}


class RunError(ValueError):
    """A run's folder cannot be written or read; the message is one line that says which file and what to do."""


def _field(column: str, kind: str) -> pa.Field:
    return pa.field(column, _TYPES[kind.removesuffix("?")], nullable=kind.endswith("?"))


SCHEMAS: dict[str, pa.Schema] = {
    table: pa.schema([_field(column, kind) for column, kind in columns.items()])
    for table, columns in (TABLES | CLUSTER_TABLES | CLIENT_TABLES).items()
}
"""Table name -> Arrow schema. A type that ends in `?` may be null; no other."""


OPTIONAL = ("decisions", "replicas")
"""Tables that a run may lack: it was recorded without decisions, or all of its replicas were alike and stayed."""


def tables_of(kind: str) -> tuple[str, ...]:
    """The tables that a run of a kind may have."""
    return tuple(CLIENT_TABLES if kind == "client" else TABLES | CLUSTER_TABLES)


def to_table(table: str, rows: Sequence[Sequence[object]]) -> pa.Table:
    """Rows, as the control plane emits them, as an Arrow table. Raises RunError for a row that does not fit."""
    schema = SCHEMAS[table]
    width = len(schema)
    wrong = next((size for size in set(map(len, rows)) if size != width), None)
    if wrong is not None:
        raise RunError(f"a row of {table} has {wrong} values; the schema names {width} columns")
    numbers = _whole_numbers(table, rows)
    arrays, columns = [], list(zip(*rows, strict=True)) or [()] * width
    for i, field in enumerate(schema):
        try:
            column = numbers[i].cast(field.type) if i in numbers else pa.array(columns[i], field.type)
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise RunError(f"a value of {table}.{field.name} is no {field.type}: {error}") from error
        if column.null_count and not field.nullable:
            raise RunError(f"a value of {table}.{field.name} is missing; only columns marked ? may be null")
        arrays.append(column)
    return pa.Table.from_arrays(arrays, schema=schema)


_NUMBERS = {
    table: [i for i, field in enumerate(schema) if pa.types.is_integer(field.type) and not field.nullable]
    for table, schema in SCHEMAS.items()
}
"""The columns that hold nothing but whole numbers."""


def _whole_numbers(table: str, rows: Sequence[Sequence[object]]) -> dict[int, pa.Array]:
    """Those columns, in a fraction of the time that it takes column by column: each row is read once, as it lies.

    None where a value is no such number.
    """
    columns = _NUMBERS[table]
    if len(columns) < 2:
        return {}
    pack = Struct(f"{len(columns)}q").pack
    try:
        flat = b"".join([pack(*numbers) for numbers in map(itemgetter(*columns), rows)])
    except StructError:
        return {}
    matrix = np.frombuffer(flat, np.int64).reshape(-1, len(columns)).T
    return {i: pa.array(np.ascontiguousarray(column)) for i, column in zip(columns, matrix, strict=True)}


def check_columns(what: str, table: str, found: pa.Schema) -> None:
    """Raise RunError unless a file has the columns it should have, with their types."""
    expected = SCHEMAS[table]
    added = records.ADDED.get(table, {})
    missing = [name for name in expected.names if name not in found.names and name not in added]
    if missing:
        raise RunError(f"{what} lacks the column {missing[0]}; it is no {table} file of this version")
    extra = [name for name in found.names if name not in expected.names]
    if extra:
        raise RunError(f"{what} has an unknown column {extra[0]}; it is no {table} file of this version")
    for field in expected:
        if field.name in found.names and found.field(field.name).type != field.type:
            raise RunError(f"{what}: column {field.name} is {found.field(field.name).type}, not {field.type}")


def filled(table: str, found: pa.Table) -> pa.Table:
    """A table with the columns that its run, of an earlier version, did not have."""
    for name, value in records.ADDED.get(table, {}).items():
        if name not in found.column_names:
            field = SCHEMAS[table].field(name)
            found = found.append_column(field, pa.array([value] * len(found), field.type))
    return found
