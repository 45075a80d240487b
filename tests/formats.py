"""One small random tensor of every format [8, 12], with floats in float32 or in the dtypes that are stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import pack, trees
from jaxquant.codebook_tensor import ColumnTensor, log_scale
from jaxquant.outliers import ColumnOutlierTensor
from jaxquant.tensors import CodebookTensor, ConcatTensor, UniformTensor, pack_order, with_outliers
from jaxquant.tiles import class_of_row, tiled_tensor
from jaxquant.vector import store_books

OUT, IN = 8, 12


def _random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _codes(seed, bits, *shape):
    return pack(jnp.asarray(np.random.default_rng(seed).integers(0, 2**bits, shape)), bits)


def _positive(seed, *shape):
    return jnp.exp(0.3 * _random(seed, *shape))


def uniform(bits=3):
    return UniformTensor(_codes(0, bits, OUT, IN), _positive(1, OUT, 2).astype(jnp.float16), _codes(2, bits, 2, OUT))


def additive(books=None):
    books = _random(3, 2, 8 * 4).astype(jnp.float16) if books is None else books
    return CodebookTensor(_codes(4, 3, 2, OUT, 3), books, _positive(5, OUT, 1).astype(jnp.float16), (1, 1), (1, 4))


def blocks():
    books = _random(6, 4, 8 * 4).astype(jnp.bfloat16)
    return CodebookTensor(_codes(7, 3, 1, OUT // 2, IN // 2), books, None, (2, 2), (2, 2))


def rows():
    books = jnp.sort(_random(8, OUT, 4)).astype(jnp.float16)
    return CodebookTensor(_codes(9, 2, 1, OUT, IN), books, None, (OUT, 1), (1, 1))


def tiles(columns=IN):
    rng = np.random.default_rng(10)
    widths = np.minimum(np.array([[2, 1], [3, 0]]), 8)[:, : -(-columns // 32)]
    row_class = rng.permutation(class_of_row(OUT, 2))
    tile = rng.permutation(np.arange(columns) // 32)
    codes = rng.integers(0, 2 ** widths[row_class][:, tile])
    return tiled_tensor(
        jnp.asarray(codes),
        jnp.asarray(widths, jnp.int32),
        jnp.concatenate([jnp.zeros(1), jnp.sort(_random(11, 2)), jnp.sort(_random(12, 4))]).astype(jnp.float16),
        _positive(13, OUT).astype(jnp.float16),
        _positive(14, columns).astype(jnp.float8_e4m3fn),
        jnp.asarray(row_class, jnp.int32),
        jnp.asarray(tile, jnp.int32),
        length=int((widths * 4).sum()) + 1,
        widest=3,
    )


def path():
    """Tiles whose codes are those of a trellis."""
    plain = tiles()
    gains = jnp.asarray([0, 0.9, 1, 1.1, 1.1, 1.2, 1.2, 1.3, 1.4], jnp.float16)
    return dataclasses.replace(plain, levels=gains, state_bits=8)


def column():
    books = store_books(_random(15, 1, 1, 2, 8, 4), 8)
    order = pack_order(jnp.asarray(np.random.default_rng(16).permutation(IN)))
    return ColumnTensor(additive(books), log_scale(_positive(17, IN)), order)


def outliers():
    return with_outliers(uniform(), _random(18, 3), jnp.asarray([2, 30, 95], jnp.int32), "float16")


def column_outliers():
    return ColumnOutlierTensor(uniform(), _random(19, OUT, 2).astype(jnp.float16), jnp.asarray([1, 7], jnp.uint16))


def concat():
    order = pack_order(jnp.asarray(np.random.default_rng(20).permutation(IN)))
    part = CodebookTensor(_codes(21, 2, 1, OUT, 8), _random(22, 8, 4).astype(jnp.float16), None, (1, 8), (1, 1))
    return ConcatTensor((part, _random(23, OUT, 4).astype(jnp.float16)), order)


FORMATS = {
    "uniform": uniform,
    "additive": additive,
    "blocks": blocks,
    "rows": rows,
    "tiles": tiles,
    "path": path,
    "column": column,
    "outliers": outliers,
    "column outliers": column_outliers,
    "concat": concat,
}


def in_float32(tensor):
    """The tensor with all floats, and codebooks stored as integers, in float32."""
    if isinstance(tensor, CodebookTensor):
        books = tensor.codebooks
        books = books.dequantize() if isinstance(books, UniformTensor) else books.astype(jnp.float32)
        scale = None if tensor.scale is None else tensor.scale.astype(jnp.float32)
        return dataclasses.replace(tensor, codebooks=books, scale=scale)
    inner = (
        {f.name: in_float32(getattr(tensor, f.name)) for f in dataclasses.fields(tensor) if f.name in ("base", "parts")}
        if dataclasses.is_dataclass(tensor)
        else {}
    )
    if isinstance(tensor, tuple):
        return tuple(in_float32(x) for x in tensor)
    tensor = dataclasses.replace(tensor, **inner) if inner else tensor
    return jax.tree.map(lambda x: x.astype(jnp.float32) if trees.is_float(x) else x, tensor)
