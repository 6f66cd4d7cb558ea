"""Columns of parquet files as arrays, whole, without Python's work for each row.

LeRobot stores a vector as a list of fixed or of any length, a tensor as lists of lists, and one
number as itself. Knows nothing of episodes: rows are counted through all files in their order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pi0.errors import DataError


class RowError(DataError):
    """A row that is not what the column should be.

    Attributes:
        row: its number.
        fault: what is wrong with it, as "expected …, found …".
    """

    def __init__(self, key: str, row: int, fault: str) -> None:
        super().__init__(f"{key}, row {row}: {fault}")
        self.row, self.fault = row, fault


def read_column(files: Sequence[Path], key: str, shape: Sequence[int]) -> NDArray[Any]:
    """[N, *shape] of all files; the stored dtype, or float64 where numbers are missing (NaN).

    Raises:
        RowError: a row has another number of values.
        DataError: a file is damaged, or has no such column.
    """
    parts, rows = [], 0
    for file in files:
        parts.append(_to_numpy(key, _read(file, key), shape, rows))
        rows += len(parts[-1])
    return np.concatenate(parts) if parts else np.zeros((0, *shape))


def column_names(file: Path) -> list[str]:
    """The columns of a file, of which lists count once."""
    with open_parquet(file) as parquet:
        names: list[str] = parquet.schema_arrow.names
        return names


def index_columns(file: Path) -> list[str]:
    """The columns that are the index of a table which pandas has written."""
    with open_parquet(file) as parquet:
        schema = parquet.schema_arrow
        described: Any = (schema.pandas_metadata or {}).get("index_columns")
        return [name for name in schema.names if name in (described or ())]


@contextlib.contextmanager
def open_parquet(
    file: Path, remedy: str = "Copy or download it again."
) -> Iterator[pq.ParquetFile]:
    """A parquet file, whose damage is a DataError that ends with the remedy."""
    try:
        with pq.ParquetFile(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError, ValueError) as error:  # the last: a name is no UTF-8
        found = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"{file}: expected a parquet file, found: {found}. {remedy}") from error


def read_table(file: Path, columns: Sequence[str]) -> pa.Table:
    """Some columns of a file.

    Raises:
        DataError: the file is damaged, or has no such column.
    """
    with open_parquet(file) as parquet:
        if missing := set(columns) - set(parquet.schema_arrow.names):
            names = [n for n in parquet.schema_arrow.names if not n.startswith("stats/")]
            raise DataError(f"{file}: expected a column {min(missing)}, found {', '.join(names)}.")
        return parquet.read(columns=list(columns))


def _read(file: Path, key: str) -> pa.Array:
    column = read_table(file, [key])[key].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # more than one array can hold
        raise DataError(f"{file}: {key}: expected at most 2 GiB in a file, found more.")
    return column


def _to_numpy(key: str, array: pa.Array, shape: Sequence[int], first: int) -> NDArray[Any]:
    """[N, *shape] of an array whose first row has the number `first`."""
    rows, each = len(array), 1  # innermost lists found so far in every row
    sizes = list(shape)
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        size = sizes.pop(0) if sizes else 1
        _require_lengths(key, array, size, first, each)
        array = array.flatten()
        each *= size
    if not (_is_number(array.type) and len(array) == rows * int(np.prod(shape))):
        raise DataError(
            f"{key}: expected numbers {['N', *shape]}, found {array.type} of another shape."
        )
    flat: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return flat.reshape(rows, *shape)


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def _require_lengths(key: str, lists: pa.Array, size: int, first: int, each: int) -> None:
    """Every list has `size` values, and none is missing; `each` lists make up a row."""
    if lists.null_count:
        row = int(np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False))[0])
        raise RowError(key, first + row // each, f"expected {size} values, found none.")
    if pa.types.is_fixed_size_list(lists.type):
        wrong = [] if lists.type.list_size == size else [0] * (len(lists) > 0)
        lengths = np.full(len(lists), lists.type.list_size)
    else:
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != size)[:1].tolist()
    for place in wrong:
        raise RowError(
            key, first + place // each, f"expected {size} values, found {lengths[place]}."
        )
