"""The operations of the network, with all the options that TTNN takes besides the operands."""

from __future__ import annotations

from typing import Any

from pi0.engines.tenstorrent.backend import Backend, Handle
from pi0.engines.tenstorrent.layout import TILE, tiled
from pi0.engines.tenstorrent.precision import Precision
from pi0.engines.tenstorrent.program_configs import attention_chunks, matmul_blocks, shards
from pi0.engines.tenstorrent.weights import Linear, RmsNorm


class Ops:
    """Operations on handles [1, 1, rows, width] unless it says otherwise.

    Args:
        in_loop: for the denoising loop: its few rows stay in the cores' memory, and the residual
            stream is divided by columns, so that a norm is not left to the one or two cores that
            have a row of tiles.
    """

    def __init__(self, backend: Backend, precision: Precision, in_loop: bool = False) -> None:
        self.backend, self.precision, self.in_loop = backend, precision, in_loop
        self._kernel = {
            fidelity: self._kernel_config(fidelity, precision.float32_sums)
            for fidelity in {precision.linear, precision.attention, precision.rest}
        }
        # TTNN rotates heads wider than 128 with sums in bfloat16 only: they are of two products.
        self._rope_kernel = self._kernel_config(precision.rest, float32_sums=False)

    def linear(self, x: Handle, weights: Linear, dtype: str, activation: str | None = None) -> Any:
        """activation(x · W + b) in a dtype, an activation by its name in TTNN."""
        unary = activation and self._unary(activation)
        return self.backend.run(
            "experimental.minimal_matmul",
            x,
            weights.weight,
            bias_tensor=weights.bias,
            fused_activation=unary,
            dtype=dtype,
            memory_config=self._memory(),
            **self._matmul(x, weights.weight, dtype),
        )

    def split_linear(self, x: Handle, weights: Linear, parts: int, dtype: str) -> list[Handle]:
        """x · W in a dtype, its columns in equal parts."""
        split: list[Handle] = self.backend.run(
            "experimental.minimal_matmul_split",
            x,
            weights.weight,
            chunks=parts,
            dtype=dtype,
            memory_config=self._memory(),
            **self._matmul(x, weights.weight, dtype),
        )
        return split

    def action_linear(
        self, x: Handle, weights: Linear, dtype: str, activation: str | None = None
    ) -> Handle:
        """As `linear`, in the fidelity of the layers on state and actions, onto the stream."""
        return self.backend.run(
            "experimental.minimal_matmul",
            x,
            weights.weight,
            bias_tensor=weights.bias,
            fused_activation=activation and self._unary(activation),
            dtype=dtype,
            memory_config=self._stream(x.shape[2], weights.weight.shape[1]),
            **self._matmul(x, weights.weight, dtype, self.precision.rest),
        )

    def add_branch(self, x: Handle, h: Handle, weights: Linear, gate: Handle) -> Handle:
        """x + gate · (h · W + b): onto the residual stream.

        One program where the matrix has the stream's dtype, which TTNN demands; else two.
        """
        dtype = self.backend.dtype(x)
        if self.backend.dtype(weights.weight) != dtype:
            stream = self._stream(x.shape[2], x.shape[3])
            return self.addcmul(x, self.linear(h, weights, dtype), gate, memory=stream)
        return self.add_linear(x, h, weights, gate, dtype, self.precision.linear)

    def add_linear(
        self, x: Handle, h: Handle, weights: Linear, gate: Handle, dtype: str, fidelity: str
    ) -> Handle:
        """x + gate · (h · W + b) in a dtype; x, W and gate have one, and gate one row or all."""
        return self.backend.run(
            "experimental.dit_minimal_matmul_addcmul_fused",
            h,
            weights.weight,
            1.0,
            x,
            gate,
            bias_tensor=weights.bias,
            dtype=dtype,
            memory_config=self._stream(x.shape[2], x.shape[3]),
            **self._matmul(h, weights.weight, dtype, fidelity),
        )

    def to_stream(self, x: Handle) -> Handle:
        """x where the residual stream is."""
        return self.backend.run("to_memory_config", x, self._stream(x.shape[2], x.shape[3]))

    def rms_norm(self, x: Handle, norm: RmsNorm, epsilon: float) -> Handle:
        return self._norm("rms_norm", x, norm.weight, norm.shift, epsilon)

    def layer_norm(self, x: Handle, norm: Linear, epsilon: float) -> Handle:
        return self._norm("layer_norm", x, norm.weight, norm.bias, epsilon)

    def heads(self, qkv: Handle, num_heads: int, num_kv_heads: int) -> tuple[Handle, ...]:
        """[B, 1, T, (H + 2K)·D] → q [B, H, T, D], k and v [B, K, T, D]."""
        q, k, v = self.backend.run(
            "experimental.nlp_create_qkv_heads",
            qkv,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            transpose_k_heads=False,
            memory_config=self._memory(),
        )
        return q, k, v

    def rope(self, qkv: Handle, cos: Handle, sin: Handle, turn: Handle) -> Handle:
        """Rotates queries and keys in [1, 1, T, (H + 2K)·D], values with them by nothing.

        Taken tile by tile, rows of 32 tokens of a head are a head of their own, which has a part of
        the tables [1, T/32·(H + 2K), 32, D] to itself: one program for all, on as many cores.

        Args:
            turn: `layout.neighbours`.
        """
        turned = self.backend.run(
            "experimental.rotary_embedding_llama",
            self.tile_view(qkv, tuple(cos.shape)),
            cos,
            sin,
            turn,
            compute_kernel_config=self._rope_kernel,
            memory_config=self._memory(),
        )
        return self.tile_view(turned, tuple(qkv.shape))

    def tile_view(self, x: Handle, shape: tuple[int, ...]) -> Handle:
        """The same tiles in the same order as a tensor of another shape, which costs nothing."""
        return self.backend.run("experimental.view", x, shape)

    def attention(
        self, q: Handle, k: Handle, v: Handle, mask: Handle | None, scale: float
    ) -> Handle:
        """[B, H, T, D], [B, K, S, D] twice and [B or 1, 1, T, S] → [B, 1, T, H·D].

        A mask beside a scale other than 1 costs a program more, which divides the mask by it.
        """
        grid = self.backend.grid
        chunks = attention_chunks(q.shape[2] // TILE, k.shape[2] // TILE, self.in_loop)
        return self.backend.run(
            "transformer.scaled_dot_product_attention",
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=False,
            scale=scale,
            output_concat_heads=True,
            program_config=self.backend.ttnn.SDPAProgramConfig(
                compute_with_storage_grid_size=(grid.x, grid.y),
                q_chunk_size=chunks[0],
                k_chunk_size=chunks[1],
                exp_approx_mode=False,
            ),
            compute_kernel_config=self._kernel[self.precision.attention],
            memory_config=self._memory(),
        )

    def write_rows(
        self, keys: Handle, k: Handle, values: Handle, v: Handle, places: Handle
    ) -> None:
        """Writes rows k and v [B, K, T, D] to their places [1, B·T] in [B, K, S, D]: row s of b is
        place b·S + s. K is 1 where B is more."""
        batch, heads, rows, width = k.shape
        k, v = (self.reshape(each, (1, heads, batch * rows, width)) for each in (k, v))
        self.backend.run("experimental.indexed_fused_update_cache", keys, k, values, v, places)

    def gelu_product(self, gate: Handle, x: Handle) -> Handle:
        """gelu(gate) · x in the tanh form, which Gemma was trained with."""
        gelu = [self._unary("GELU_TANH")]
        return self.backend.run(
            "multiply", gate, x, input_tensor_a_activations=gelu, memory_config=self._memory()
        )

    def add(self, a: Handle, b: Handle, dtype: str) -> Handle:
        return self.backend.run("add", a, b, dtype=dtype, memory_config=self._memory())

    def addcmul(
        self, a: Handle, b: Handle, c: Handle, factor: float = 1.0, memory: Any = None
    ) -> Handle:
        """a + factor · b · c, where the others are or in a memory of its own."""
        memory = memory or self._memory()
        return self.backend.run("addcmul", a, b, c, value=factor, memory_config=memory)

    def concat(self, parts: list[Handle], dim: int) -> Handle:
        return self.backend.run("concat", parts, dim=dim)

    def reshape(self, x: Handle, shape: tuple[int, ...]) -> Handle:
        """Another view of whole tiles, which costs nothing."""
        return self.backend.run("reshape", x, shape)

    def embed(self, tokens: Handle, table: Handle) -> Handle:
        """[B, L] → [B, 1, L, E]."""
        rows = self.backend.run(
            "embedding",
            tokens,
            table,
            layout=self.backend.option("TILE_LAYOUT"),
            dtype=self.precision.residual,
        )
        batch, length, width = rows.shape
        return self.reshape(rows, (batch, 1, length, width))

    def _norm(
        self, name: str, x: Handle, weight: Handle, bias: Handle | None, epsilon: float
    ) -> Handle:
        rows, width = x.shape[2], x.shape[3]
        program = {}
        if self.in_loop:
            grid = shards(tiled(width) // TILE)
            columns = width // TILE // grid.cores
            program["program_config"] = self.backend.ttnn.LayerNormShardedMultiCoreProgramConfig(
                compute_with_storage_grid_size=(grid.x, grid.y),
                subblock_w=columns,
                block_h=rows // TILE,
                block_w=columns,
                inplace=False,
            )
        return self.backend.run(
            name,
            x,
            epsilon=epsilon,
            weight=weight,
            bias=bias,
            compute_kernel_config=self._kernel[self.precision.rest],
            memory_config=self._stream(rows, width),
            **program,
        )

    def _kernel_config(self, fidelity: str, float32_sums: bool) -> Any:
        return self.backend.ttnn.init_device_compute_kernel_config(
            self.backend.arch,
            math_fidelity=self.backend.option(f"MathFidelity.{fidelity}"),
            math_approx_mode=False,
            fp32_dest_acc_en=float32_sums,
            packer_l1_acc=True,
        )

    def _unary(self, name: str) -> Any:
        return self.backend.ttnn.UnaryWithParam(self.backend.option(f"UnaryOpType.{name}"))

    def _memory(self) -> Any:
        return self.backend.option("L1_MEMORY_CONFIG" if self.in_loop else "DRAM_MEMORY_CONFIG")

    def _stream(self, rows: int, width: int) -> Any:
        """Where the residual stream and the norms are."""
        if not self.in_loop:
            return self._memory()
        ttnn, grid = self.backend.ttnn, shards(tiled(width) // TILE)
        return ttnn.create_sharded_memory_config(
            (rows, tiled(width) // grid.cores),
            core_grid=ttnn.CoreGrid(x=grid.x, y=grid.y),
            strategy=ttnn.ShardStrategy.WIDTH,
            use_height_and_width_as_shard_shape=True,
        )

    def _matmul(
        self, x: Handle, weight: Handle, dtype: str, fidelity: str | None = None
    ) -> dict[str, Any]:
        """Program and kernel of x · weight."""
        rows = x.shape[0] * x.shape[2]
        m, k, n = (tiled(length) // TILE for length in (rows, x.shape[3], weight.shape[1]))
        grid = self.backend.grid
        dtypes = (self.backend.dtype(x), self.backend.dtype(weight), dtype)
        b = matmul_blocks(m, k, n, grid, dtypes, self.precision.float32_sums)
        return {
            "config": self.backend.ttnn.MinimalMatmulConfig(
                M_block_size=b.rows,
                K_block_size=b.inner,
                N_block_size=b.columns,
                subblock_h=b.sub_rows,
                subblock_w=b.sub_columns,
                compute_with_storage_grid_size=self.backend.ttnn.CoreCoord(grid.x, grid.y),
            ),
            "compute_kernel_config": self._kernel[fidelity or self.precision.linear],
        }
