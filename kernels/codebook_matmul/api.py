"""Products with additive codes in slots: which implementation can do which, and calling it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.kernels import too_old
from jaxquant.kernels.codebook_matmul.layout import Weight, alike
from jaxquant.prologue import Prologue

# Beyond these the tables cost more than they save; on TPUs and GPUs other kernels decode then, on GPUs what they can.
CPU_TOKENS, TPU_TABLE_TOKENS, TPU_TOKENS, GPU_TABLE_TOKENS, GPU_TOKENS = 4, 4, 128, 2, 8
GATHER_SIZE = 2**21  # weights, up to which a GPU gathers entries rather than products
# Decoding holds all inputs in a TPU's fast memory, once per codebook: tokens * in * M.
TPU_INPUTS = 3_500_000


def supports(
    implementation: str,
    *,
    bits: int,
    count: int,
    vector: tuple[int, int],
    blocks: tuple[int, int],
    scale: tuple[int, ...] | None,
    columns: int,
    tokens: int,
) -> str | None:
    """Says why an implementation cannot do a product.

    Args:
      implementation: "cpu", "tpu" or "gpu".
      bits: width of a code.
      count: M, codebooks that are added up.
      vector: (g, d), rows and columns of an entry.
      blocks: (R, C).
      scale: shape of the scale, or None.
      columns: of the weight.
      tokens: rows of x.

    Returns:
      None if it can, otherwise the reason.
    """
    if bits > 8:
        return f"expected codes of at most 8 bits, got {bits}"
    if vector[0] != 1:
        return f"expected entries of one row, got {vector[0]} x {vector[1]}"
    if scale is not None and min(scale) > 1:
        return f"expected scales of rows or of columns, got scales {scale[0]} x {scale[1]}"
    if implementation == "gpu":
        if reason := too_old():
            return reason
        if tokens > GPU_TOKENS and not _decodes(count, vector[1]):
            got = f"{count} with vectors of {vector[1]}"
            known = "1, 2 or 4 codebooks with vectors of 8, or 1 or 2 with vectors of 16,"
            return f"expected {known} beyond {GPU_TOKENS} tokens, got {got}"
        return fits_banks(count, vector[1], blocks)
    most = CPU_TOKENS if implementation == "cpu" else TPU_TOKENS
    if tokens > most:
        return f"expected at most {most} tokens, got {tokens}; make the weight dense for many tokens"
    if implementation == "cpu":
        return None
    if (bits, blocks[0]) != (8, 1):
        return f"expected codes of 8 bits and codebooks for all rows, got {bits} bits, {blocks[0]} row blocks"
    if tokens <= TPU_TABLE_TOKENS:
        return None
    if (vector[1], blocks[1]) != (8, 1) or count not in (1, 2, 4):
        return (
            f"expected 1, 2 or 4 codebooks with vectors of 8 in one block beyond {TPU_TABLE_TOKENS} tokens, "
            f"got {count} with vectors of {vector[1]} in {blocks[1]} blocks"
        )
    if tokens * columns * count > TPU_INPUTS:
        return f"expected at most {TPU_INPUTS // (columns * count)} tokens of {columns} inputs, got {tokens}"
    return None


def _decodes(count: int, dimension: int) -> bool:
    """Whether a GPU multiplies many tokens with `count` codebooks of vectors."""
    return (dimension == 8 and count in (1, 2, 4)) or (dimension == 16 and count in (1, 2))


def fits_banks(count: int, dimension: int, blocks: tuple[int, int]) -> str | None:
    """Says why `count` codebooks of vectors do not fit the layout for GPUs; None if they do."""
    if count not in (1, 2, 4, 8) or dimension not in (4, 8, 16):
        return f"expected 1, 2, 4 or 8 codebooks with vectors of 4, 8 or 16, got {count} with vectors of {dimension}"
    if blocks != (1, 1):
        return f"expected codebooks for all of the weight, got {blocks[0]} x {blocks[1]} blocks"
    return None


def codebook_matmul(
    x: jax.Array,
    slots: jax.Array,
    codebooks: jax.Array,
    scale: jax.Array | None,
    *,
    blocks: tuple[int, int],
    dimension: int,
    out: int,
    implementation: str,
) -> jax.Array:
    """Returns x @ W.T on a CPU or TPU, float32 [tokens, out].

    Args:
      x: float [tokens, in].
      slots: uint8 [in / d * M, out or more], see `layout`.
      codebooks: float [R * C * M, K * d].
      scale: float [out or 1, 1] or [1, in / d], or None.
      blocks: (R, C).
      dimension: d.
      out: outputs without padding.
      implementation: "cpu" or "tpu", one that `supports` has no objection to.
    """
    settings: dict[str, Any] = {"blocks": blocks, "dimension": dimension, "out": out}
    if implementation == "cpu":
        from jaxquant.kernels.codebook_matmul.cpu import lookup_matmul

        return lookup_matmul(x, slots, codebooks, scale, **settings)
    from jaxquant.kernels.codebook_matmul import tpu

    product = tpu.lookup_matmul if len(x) <= TPU_TABLE_TOKENS else tpu.decode_matmul
    return product(x, slots, codebooks, scale, **settings)


def _gather_plan(x: Any, weights: Sequence[Weight], prologue: Any, residual: Any, dimension: int, dtype: Any) -> Any:
    """The plan of `gpu_gather` for products with few tokens and small weights that it can do together, otherwise None."""
    from jaxquant.kernels.codebook_matmul.gpu_gather_plan import make_plan

    if len(x) > GPU_TOKENS or any(x.shape[1] * words.shape[1] > GATHER_SIZE for words, _, _ in weights):
        return None
    return make_plan(x, weights, prologue, residual, dimension=dimension, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("dimension", "dtype"))  # layers of one shape are lowered once
def banked_matmuls(
    x: jax.Array,
    weights: Sequence[Weight],
    prologue: Prologue | None = None,
    residual: jax.Array | None = None,
    *,
    dimension: int,
    dtype: jnp.dtype,
) -> list[jax.Array]:
    """Returns residual + prologue(x) @ W.T by the GPU kernels for several weights, each [tokens, out] of `dtype`.

    Args:
      x: float [tokens, in].
      weights: see `gpu.lookup_matmul`, `gpu_batch.decode_matmul` and `gpu_gather.gather_matmul`.
      prologue: what is done to x first, or None.
      residual: float [tokens, out] of the only weight, of `dtype`, or None.
      dimension: d.
      dtype: of the results.
    """
    from jaxquant.kernels.codebook_matmul import gpu, gpu_batch, gpu_gather

    settings: dict[str, Any] = {"dimension": dimension, "dtype": dtype}
    plan = _gather_plan(x, weights, prologue, residual, **settings)
    if plan is not None:
        return gpu_gather.gather_matmul(plan, x, weights, prologue, residual)
    most = GPU_TOKENS if x.dtype == jnp.float32 else GPU_TABLE_TOKENS  # decoding rounds inputs to float16
    by_lookup = len(x) <= most or not _decodes(len(weights[0][1]), dimension)
    if by_lookup and alike(weights):
        return gpu.lookup_matmul(x, weights, prologue, residual, **settings)
    x = x if prologue is None else prologue(x)
    if len(weights) > 1:
        return [banked_matmuls(x, [weight], **settings)[0] for weight in weights]
    y = gpu_batch.decode_matmul(x, *weights[0], **settings)
    return [y if residual is None else residual + y]
