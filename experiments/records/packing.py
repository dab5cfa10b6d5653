"""Rows of numbers and names on their way to a file, packed: eight bytes a value instead of objects."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from experiments.records.schema import SCHEMAS, RunError, to_table

_NULL = -(1 << 63)
_WHOLE = (pa.int64(), pa.int32(), pa.bool_())


class _Codes(dict[str, int]):
    """A number for each name, in order of coming up."""

    def __missing__(self, name: str) -> int:
        if not isinstance(name, str):
            raise TypeError
        self[name] = code = len(self)
        return code


class PackedRows:
    """Rows of a table whose columns are whole numbers, truth values and strings that repeat; `many` is for `append`.

    One thread may append while another takes: a row is added, and rows are removed, at one stroke. A row that does not
    fit its schema is told by `take`, as `to_table` tells it.
    """

    def __init__(self, table: str, many: int) -> None:
        self._table = table
        self._schema = SCHEMAS[table]
        self._row = struct.Struct(f"{len(self._schema)}q")
        self._strings = [i for i, field in enumerate(self._schema) if field.type == pa.string()]
        self._nullable = [i for i, field in enumerate(self._schema) if field.nullable]
        assert all(field.type in (*_WHOLE, pa.string()) for field in self._schema), f"{table} has other columns, too"
        self._rows = bytearray()
        self._bytes_of_many = many * self._row.size
        self._codes = _Codes()
        self._misfits: list[Sequence[object]] = []

    def __len__(self) -> int:
        return len(self._rows) // self._row.size + len(self._misfits)

    @property
    def num_names(self) -> int:
        """Different strings so far."""
        return len(self._codes)

    def append(self, row: Sequence[object]) -> bool:
        """Take in a row. Whether there are `many` by now."""
        try:
            values, codes = list(row), self._codes
            for i in self._strings:
                values[i] = codes[values[i]]  # type: ignore[index]  # it says so itself where it is no string
            for i in self._nullable:
                if values[i] is None:
                    values[i] = _NULL
            packed = self._row.pack(*values)
        except (struct.error, TypeError, IndexError):
            self._misfits.append(row)
            return False
        rows = self._rows
        rows += packed
        return len(rows) >= self._bytes_of_many

    def take(self, count: int) -> pa.Table:
        """The first `count` rows, which stay until `remove`. Raises RunError for one that does not fit."""
        if self._misfits:
            to_table(self._table, self._misfits)
            raise RunError(f"a row of {self._table} holds something else than whole numbers and strings")
        taken = bytes(self._rows[: count * self._row.size])
        columns = np.frombuffer(taken, dtype=np.int64).reshape(count, len(self._schema)).T
        names = pa.array(list(self._codes), pa.string()) if self._strings else None
        arrays = [
            self._array(field, np.ascontiguousarray(c), names) for field, c in zip(self._schema, columns, strict=True)
        ]
        return pa.Table.from_arrays(arrays, schema=self._schema)

    def _array(self, field: pa.Field, values: np.ndarray, names: pa.Array | None) -> pa.Array:
        if names is not None and field.type == pa.string():
            return names.take(pa.array(values))
        if field.type == pa.bool_():
            wrong, array = (values & ~1).any(), values.astype(bool)
        else:
            array = values.astype(field.type.to_pandas_dtype())
            wrong = (array != values).any()
        if wrong and not field.nullable:
            raise RunError(f"a value of {self._table}.{field.name} is no {field.type}")
        return pa.array(array, field.type, mask=values == _NULL if field.nullable else None)

    def remove(self, count: int) -> None:
        """Forget the first `count` rows."""
        del self._rows[: count * self._row.size]

    def forget_names(self) -> None:
        """Start over with the strings, once there is no row left that has one."""
        assert not self._rows
        self._codes = _Codes()
