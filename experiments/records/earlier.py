"""What runs of earlier versions lack, worked out from what they have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def without_squares(steps: pa.Table) -> bool:
    """Whether a table of steps is of before there were sums of squares: with chunks they are above 0."""
    return bool(pc.any(pc.and_(pc.greater(steps["num_chunks"], 0), pc.equal(steps["chunk_squares"], 0))).as_py())


def with_squares(steps: pa.Table, decisions: pa.Table | None) -> pa.Table:
    """Steps with `chunk_squares`, from the chunks among the decisions; where those of a step are not known, as if its
    chunks had been of one size."""
    counts, tokens = steps["num_chunks"].to_numpy(), steps["chunk_tokens"].to_numpy().astype(np.int64)
    squares = tokens * tokens // np.maximum(1, counts)
    if decisions is not None:
        chunks = decisions.filter(pc.equal(decisions["kind"], "chunk"))
        rows = {
            key: i for i, key in enumerate(zip(steps["replica"].to_pylist(), steps["step"].to_pylist(), strict=True))
        }
        named = zip(chunks["replica"].to_pylist(), chunks["step"].to_pylist(), strict=True)
        row = np.array([rows.get(key, -1) for key in named], np.int64)
        sizes, known = chunks["tokens"].to_numpy(), row >= 0
        found = np.bincount(row[known], minlength=len(steps))
        summed = np.zeros(len(steps), np.int64)
        np.add.at(summed, row[known], sizes[known] ** 2)
        squares = np.where(found == counts, summed, squares)
    place = steps.schema.get_field_index("chunk_squares")
    return steps.set_column(place, steps.schema.field(place), pa.array(squares, pa.int64()))


def _keys(table: pa.Table) -> Iterator[tuple[int, int]]:
    """Replica and step of each row."""
    return zip(table["replica"].to_pylist(), table["step"].to_pylist(), strict=True)
