"""The operations of the network, with all the options that TTNN takes besides the operands."""

from __future__ import annotations

from typing import Any

from pi0.engines.tenstorrent.backend import Backend, Handle
from pi0.engines.tenstorrent.layout import TILE, tiled
from pi0.engines.tenstorrent.precision import Precision
from pi0.engines.tenstorrent.program_configs import ROWS_IN_L1, attention_chunks, matmul_blocks
from pi0.engines.tenstorrent.weights import Linear, RmsNorm


class Ops:
    """Operations on handles [1, 1, rows, width] unless it says otherwise."""

    def __init__(self, backend: Backend, precision: Precision) -> None:
        self.backend, self.precision = backend, precision
        self._kernel = {
            fidelity: backend.ttnn.init_device_compute_kernel_config(
                backend.arch,
                math_fidelity=backend.option(f"MathFidelity.{fidelity}"),
                math_approx_mode=False,
                fp32_dest_acc_en=precision.float32_sums,
                packer_l1_acc=True,
            )
            for fidelity in {precision.linear, precision.attention, precision.rest}
        }

    def linear(self, x: Handle, weights: Linear, dtype: str) -> Handle:
        """x · W + b in a dtype."""
        return self.backend.run(
            "linear",
            x,
            weights.weight,
            bias=weights.bias,
            dtype=dtype,
            program_config=self._matmul(x, weights.weight, dtype),
            compute_kernel_config=self._kernel[self.precision.linear],
            memory_config=self._memory(x),
        )

    def rms_norm(self, x: Handle, norm: RmsNorm, epsilon: float) -> Handle:
        return self.backend.run(
            "rms_norm",
            x,
            epsilon=epsilon,
            weight=norm.weight,
            bias=norm.shift,
            compute_kernel_config=self._kernel[self.precision.rest],
            memory_config=self._memory(x),
        )

    def layer_norm(self, x: Handle, norm: Linear, epsilon: float) -> Handle:
        return self.backend.run(
            "layer_norm",
            x,
            epsilon=epsilon,
            weight=norm.weight,
            bias=norm.bias,
            compute_kernel_config=self._kernel[self.precision.rest],
            memory_config=self._memory(x),
        )

    def heads(self, qkv: Handle, num_heads: int, num_kv_heads: int) -> tuple[Handle, ...]:
        """[B, 1, T, (H + 2K)·D] → q [B, H, T, D], k and v [B, K, T, D]."""
        q, k, v = self.backend.run(
            "experimental.nlp_create_qkv_heads",
            qkv,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            transpose_k_heads=False,
            memory_config=self._memory(qkv),
        )
        return q, k, v

    def rope(self, x: Handle, cos: Handle, sin: Handle) -> Handle:
        """Rotates heads [1, H, T, D] by tables [1, 1, T, D]."""
        return self.backend.run(
            "experimental.rotary_embedding", x, cos, sin, memory_config=self._memory(x)
        )

    def attention(
        self, q: Handle, k: Handle, v: Handle, mask: Handle | None, scale: float
    ) -> Handle:
        """[B, H, T, D], [B, K, S, D] twice and [1, 1, T, S] → [B, 1, T, H·D]."""
        grid = self.backend.grid
        q_chunk, k_chunk = attention_chunks(q.shape[2] // TILE, k.shape[2] // TILE)
        attended = self.backend.run(
            "transformer.scaled_dot_product_attention",
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=False,
            scale=scale,
            program_config=self.backend.ttnn.SDPAProgramConfig(
                compute_with_storage_grid_size=(grid.x, grid.y),
                q_chunk_size=q_chunk,
                k_chunk_size=k_chunk,
                exp_approx_mode=False,
            ),
            compute_kernel_config=self._kernel[self.precision.attention],
        )
        return self.backend.run(
            "experimental.nlp_concat_heads", attended, memory_config=self._memory(q)
        )

    def gelu(self, x: Handle) -> Handle:
        """The tanh form, which Gemma and SigLIP were trained with."""
        variant = self.backend.option("GeluVariant.Tanh")
        return self.backend.run("gelu", x, variant=variant, memory_config=self._memory(x))

    def silu(self, x: Handle) -> Handle:
        return self.backend.run("silu", x)

    def add(self, a: Handle, b: Handle) -> Handle:
        return self.backend.run("add", a, b, memory_config=self._memory(a))

    def add_branch(self, x: Handle, branch: Handle, norm: RmsNorm) -> Handle:
        """The residual sum, the branch gated if the norm before it is adaptive."""
        if norm.gate is None:
            return self.add(x, branch)
        return self.backend.run("addcmul", x, branch, norm.gate, memory_config=self._memory(x))

    def multiply(self, a: Handle, b: Handle | float) -> Handle:
        return self.backend.run("multiply", a, b, memory_config=self._memory(a))

    def cast(self, x: Handle, dtype: str) -> Handle:
        return self.backend.run("typecast", x, dtype=dtype)

    def concat(self, parts: list[Handle], dim: int) -> Handle:
        return self.backend.run("concat", parts, dim=dim)

    def reshape(self, x: Handle, shape: tuple[int, ...]) -> Handle:
        return self.backend.run("reshape", x, shape)

    def rows(self, x: Handle, start: int, stop: int) -> Handle:
        """Rows [start, stop) of [1, 1, rows, width]."""
        return self.backend.run("slice", x, [0, 0, start, 0], [1, 1, stop, x.shape[3]])

    def embed(self, tokens: Handle, table: Handle) -> Handle:
        """[1, L] → [1, 1, L, E]."""
        rows = self.backend.run(
            "embedding",
            tokens,
            table,
            layout=self.backend.option("TILE_LAYOUT"),
            dtype=self.precision.residual,
        )
        return self.reshape(rows, (1, *rows.shape))

    def cut_patches(self, pixels: Handle, patch: int, rows: int) -> Handle:
        """[V, S, S, 3] → [V, 1, rows, tiled 3·patch²]: whole patches, padded to tiles."""
        views, side = pixels.shape[0], pixels.shape[1]
        grid, line = side // patch, 3 * patch
        cells = self.reshape(pixels, (views, grid, patch, grid, line))
        cells = self.backend.run("permute", cells, (0, 1, 3, 2, 4))
        flat = self.reshape(cells, (views, 1, grid * grid, patch * line))
        more = (rows - grid * grid, tiled(patch * line) - patch * line)
        flat = self.backend.run("pad", flat, [(0, 0), (0, 0), (0, more[0]), (0, more[1])], 0.0)
        return self.backend.run("to_layout", flat, self.backend.option("TILE_LAYOUT"))

    def _memory(self, x: Handle) -> Any:
        few = x.shape[2] <= ROWS_IN_L1 * TILE
        return self.backend.option("L1_MEMORY_CONFIG" if few else "DRAM_MEMORY_CONFIG")

    def _matmul(self, x: Handle, weight: Handle, dtype: str) -> Any:
        m, k, n = (tiled(length) // TILE for length in (x.shape[2], x.shape[3], weight.shape[1]))
        grid = self.backend.grid
        dtypes = (self.backend.dtype(x), self.backend.dtype(weight), dtype)
        b = matmul_blocks(m, k, n, grid, dtypes, self.precision.float32_sums)
        common: dict[str, Any] = {
            "compute_with_storage_grid_size": (grid.x, grid.y),
            "in0_block_w": b.inner,
            "out_subblock_h": b.sub_rows,
            "out_subblock_w": b.sub_columns,
            "out_block_h": b.block_rows,
            "out_block_w": b.block_columns,
            "per_core_M": b.rows,
            "per_core_N": b.columns,
            "fused_activation": None,
        }
        if b.spread == "columns":
            config = self.backend.ttnn.MatmulMultiCoreReuseMultiCast1DProgramConfig
            return config(**common, fuse_batch=True, mcast_in0=True)
        config = self.backend.ttnn.MatmulMultiCoreReuseMultiCastProgramConfig
        return config(**common, transpose_mcast=False)
