"""How an operation is laid out over a device's cores: block sizes from its grid and its memory.

Lengths are in tiles of 32 × 32.
"""

from __future__ import annotations

from dataclasses import dataclass

from pi0.engines.tenstorrent.backend import Grid

# Of the 1.5 MB (Wormhole 1499136 B, Blackhole 1572864 B) of a core's memory, what buffers of one
# matrix product may take; the rest is left to tensors that stay there.
BUDGET = 1_000_000
TILE_BYTES = {"bfloat16": 2048, "bfloat8_b": 1088, "float32": 4096}
ROWS_IN_L1 = 4  # activations of at most this many tile rows stay in the cores' memory
K_BLOCK = 8  # tiles of the inner dimension taken at a time, at most


@dataclass(frozen=True)
class MatmulBlocks:
    """Blocks of a matrix product.

    Attributes:
        rows, columns: output tiles of a core.
        block_rows, block_columns: of these, how many at a time.
        inner: tiles of the inner dimension at a time.
        sub_rows, sub_columns: tiles that are in the registers together.
        spread: "columns": all cores divide the columns, each has all rows; "both": rows of the
            grid divide the rows, its columns the columns.
    """

    rows: int
    columns: int
    block_rows: int
    block_columns: int
    inner: int
    sub_rows: int
    sub_columns: int
    spread: str


def matmul_blocks(
    m: int, k: int, n: int, grid: Grid, dtypes: tuple[str, str, str], float32_sums: bool
) -> MatmulBlocks:
    """Blocks of an [m, k] × [k, n] product.

    Args:
        dtypes: of the two operands and of the product.
        float32_sums: sums in float32, which halves the registers to 4 tiles.
    """
    registers = 4 if float32_sums else 8
    if m <= ROWS_IN_L1:
        rows, columns, spread = m, ceil(n, grid.cores), "columns"
    else:
        rows, columns, spread = ceil(m, grid.y), ceil(n, grid.x), "both"
    a, b, out = (TILE_BYTES[dtype] for dtype in dtypes)
    sums = TILE_BYTES["float32" if float32_sums else "bfloat16"]

    def memory(block_rows: int, block_columns: int, inner: int) -> int:
        operands = 2 * inner * (block_rows * a + block_columns * b)  # two of each: one fills
        return operands + block_rows * block_columns * (out + sums)

    fitting = [
        (block_rows * block_columns, inner, block_rows, block_columns)
        for block_rows in (divisors(rows) if spread == "both" else [rows])
        for block_columns in (divisors(columns) if spread == "both" else [columns])
        for inner in divisors(k)
        if inner <= K_BLOCK and memory(block_rows, block_columns, inner) <= BUDGET
    ]
    _, inner, block_rows, block_columns = max(fitting)
    sub_columns = max(d for d in divisors(block_columns) if d <= registers)
    whole = sub_columns == block_columns  # only then may a block in registers have several rows
    most = registers // sub_columns if whole else 1
    sub_rows = max(d for d in divisors(block_rows) if d <= most)
    return MatmulBlocks(
        rows, columns, block_rows, block_columns, inner, sub_rows, sub_columns, spread
    )


def attention_chunks(queries: int, keys: int) -> tuple[int, int]:
    """Tokens of queries and keys taken at a time: the largest that fit with heads of 256."""
    return min(queries * 32, 128), min(keys * 32, 128)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
