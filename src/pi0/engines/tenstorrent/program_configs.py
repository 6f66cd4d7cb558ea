"""How an operation is laid out over a device's cores: block sizes from its grid and its memory.

Lengths are in tiles of 32 × 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pi0.engines.tenstorrent.backend import Grid

# Of the 1.5 MB (Wormhole 1499136 B, Blackhole 1572864 B) of a core's memory, what buffers of one
# matrix product may take; the rest is left to tensors that stay there.
BUDGET = 1_000_000
TILE_BYTES = {"bfloat16": 2048, "bfloat8_b": 1088, "float32": 4096}
LONGEST = 8  # tiles of a block in each direction, at most
SHARDS = (16, 8, 4, 2, 1)  # cores that the loop's residual stream can lie on, two rows of eight
LOOP_QUERIES = 32  # tokens of queries taken at a time in the loop: 8 heads of 64 fill 16 cores


@dataclass(frozen=True)
class MatmulBlocks:
    """Blocks of a matrix product.

    The shorter side of the grid's rectangle of cores, rows unless the product is taller than wide,
    divides the rows of the product, the other one its columns.

    Attributes:
        rows, columns: output tiles of a core at a time.
        inner: tiles of the inner dimension at a time.
        sub_rows, sub_columns: tiles that are in the registers together.
    """

    rows: int
    columns: int
    inner: int
    sub_rows: int
    sub_columns: int


@lru_cache
def matmul_blocks(
    m: int, k: int, n: int, grid: Grid, dtypes: tuple[str, str, str], float32_sums: bool
) -> MatmulBlocks:
    """Blocks of an [m, k] × [k, n] product, to which a tensor of the product's dtype may be added.

    What a core pays is counted as one for a tile, for each time that its registers are filled, and
    for each block: where its share is a prime number of tiles, it is given one more rather than few
    at a time.

    Args:
        dtypes: of the two operands and of the product.
        float32_sums: sums in float32, which halves the registers to 4 tiles.
    """
    registers = 4 if float32_sums else 8
    down, across = (grid.x, grid.y) if m > n else (grid.y, grid.x)
    own_rows, own_columns = ceil(m, down), ceil(n, across)
    a, b, out = (TILE_BYTES[dtype] for dtype in dtypes)
    sums = TILE_BYTES["float32" if float32_sums else "bfloat16"]

    def memory(rows: int, columns: int, inner: int) -> int:
        operands = 2 * inner * (rows * a + columns * b)  # two of each: one fills
        return operands + rows * columns * (4 * out + sums)

    sizes = range(1, LONGEST + 1)
    fitting = [
        (
            -tiles * (1 + 1 / together + 1 / (rows * columns)),
            inner,
            rows,
            columns,
            sub_rows,
            together,
        )
        for rows in sizes
        for columns in sizes
        for tiles in [ceil(own_rows, rows) * rows * ceil(own_columns, columns) * columns]
        for sub_rows in divisors(rows)
        for sub_columns in divisors(columns)
        for together in [sub_rows * sub_columns]
        if 1 < together <= registers
        for inner in divisors(k)
        if inner <= LONGEST and memory(rows, columns, inner) <= BUDGET
    ]
    _, inner, rows, columns, sub_rows, together = max(fitting)
    return MatmulBlocks(rows, columns, inner, sub_rows, together // sub_rows)


def attention_chunks(queries: int, keys: int, in_loop: bool) -> tuple[int, int]:
    """Tokens of queries and keys taken at a time: the largest that fit with heads of 256, and of
    the loop's few queries less, for more cores."""
    most = LOOP_QUERIES if in_loop else 128
    return min(queries * 32, most), min(keys * 32, 128)


def shards(columns: int) -> Grid:
    """Cores among which a width in tiles is divided."""
    cores = next(count for count in SHARDS if columns % count == 0)
    return Grid(min(cores, 8), ceil(cores, 8))


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
