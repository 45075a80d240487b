"""Products with scalar codes in half words: which implementation can do which, and calling it."""

import jax

TPU_TOKENS = 128
TPU_INPUTS = 3_500_000  # tokens * in that fit in a TPU's fast memory
_NO_KERNEL = {"cpu": "a CPU kernel for additive codes only", "gpu": "no GPU kernel yet"}


def supports(implementation: str, *, bits: int, group: int | None, columns: int, tokens: int) -> str | None:
    """Says why an implementation cannot do a product with uniform grids; None if it can.

    Args:
      implementation: "cpu", "tpu" or "gpu".
      bits: width of a code.
      group: columns that share a scale, or None for whole rows.
      columns: of the weight.
      tokens: rows of x.
    """
    if implementation != "tpu":
        return f"there is {_NO_KERNEL[implementation]}"
    if bits not in (2, 3, 4, 8):
        return f"expected codes of 2, 3, 4 or 8 bits, got {bits}"
    if group is not None and group % 16:
        return f"expected groups of a multiple of 16 columns, got {group}"
    return _too_many(tokens, columns)


def supports_levels(implementation: str, *, scale: tuple[int, ...] | None, columns: int, tokens: int) -> str | None:
    """Says why an implementation cannot do a product with a table of levels per row; None if it can."""
    if implementation != "tpu":
        return f"there is {_NO_KERNEL[implementation]}"
    if scale is not None and min(scale) > 1:
        return f"expected scales of rows or of columns, got scales {scale[0]} x {scale[1]}"
    return _too_many(tokens, columns)


def _too_many(tokens: int, columns: int) -> str | None:
    most = min(TPU_TOKENS, TPU_INPUTS // max(1, columns))
    if tokens <= most:
        return None
    return f"expected at most {most} tokens, got {tokens}; make the weight dense for many tokens"


def uniform_matmul(x: jax.Array, words: jax.Array, scale: jax.Array, zero: jax.Array | None, *, bits: int) -> jax.Array:
    """Returns x @ W.T by the TPU kernel, float32 [tokens, out]; see `tpu.uniform_matmul`."""
    from jaxquant.kernels.uniform_matmul import tpu

    return tpu.uniform_matmul(x, words, scale, zero, bits=bits)


def level_matmul(x: jax.Array, words: jax.Array, levels: jax.Array, scale: jax.Array | None, *, bits: int) -> jax.Array:
    """Returns x @ W.T by the TPU kernel, float32 [tokens, out]; see `tpu.level_matmul`."""
    from jaxquant.kernels.uniform_matmul import tpu

    return tpu.level_matmul(x, words, levels, scale, bits=bits)
