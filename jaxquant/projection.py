"""Codes for a target: which codes of a quantized weight to change so that it comes nearer to a dense matrix.

Only the vectors that are farthest from their part of the target change. Every format has a rule: additive codes are
searched by a beam, scalars of grids and codebooks take the nearest value, scalars of tiles move to a neighbouring level,
and trellis codes move in whole rings.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import beam, grid, trellis
from jaxquant.codebook_tensor import ColumnTensor
from jaxquant.kernels.trellis_paths.api import paths
from jaxquant.outliers import ColumnOutlierTensor
from jaxquant.packing import pack
from jaxquant.tensors import (
    CodebookTensor,
    ConcatTensor,
    OutlierTensor,
    QuantizedTensor,
    UniformTensor,
    dense,
    unpack_order,
)
from jaxquant.tiles import TILE, TiledTensor, class_sizes, pack_tiles

# Vectors searched at once where each has codebooks of its own, in float32 scores.
_SCORES = 2**26


@dataclasses.dataclass(frozen=True)
class CodeConfig:
    """Settings of the V step; the defaults are those of PV-tuning's released recipe but for `trust`.

    Attributes:
      learning_rate: length of a step of the buffer, relative to its norm (LAMB).
      decay: of the buffer's second moments.
      share: of the vectors of a matrix that may change per step, rounded up.
      trust: largest norm of all changes of a matrix in a step, relative to the matrix; the first change is always
        allowed. None for no limit.
      pull: delta in A = (1 - delta) * A + delta * V: 0 lets the buffer accumulate, 1 begins afresh in every step.
      beam: partial sums kept in the search for additive codes.
    """

    learning_rate: float = 1e-2
    _: dataclasses.KW_ONLY
    decay: float = 0.95
    share: float = 0.01
    trust: float | None = None
    pull: float = 0.0
    beam: int = 5

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("learning_rate", "decay", "share", "pull"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
        if not self.share:
            raise ValueError("share: expected a number above 0, got 0")
        if self.trust is not None and not self.trust >= 0:
            raise ValueError(f"trust: expected a number >= 0 or None, got {self.trust!r}")
        if not isinstance(self.beam, int) or self.beam < 1:
            raise ValueError(f"beam: expected an integer >= 1, got {self.beam!r}")


def _allowed(before: jax.Array, after: jax.Array, change: jax.Array, norm: jax.Array, trust: float | None) -> jax.Array:
    """Which changes to make, bool [k], of candidates in the order of falling distance.

    Args:
      before: float32 [k], squared distance to the target with the present code.
      after: float32 [k], with the new one; what is not nearer is refused.
      change: float32 [k], squared norm of the change.
      norm: float32 scalar, squared norm of the matrix.
      trust: see `CodeConfig`.
    """
    better = after < before
    if trust is None:
        return better
    spent = jnp.cumsum(jnp.where(better, change, 0))
    first = jnp.arange(len(better)) == jnp.argmax(better)
    return better & ((spent <= trust**2 * norm) | first)


def _farthest(distance: jax.Array, share: float) -> jax.Array:
    """Places of the largest distances [n], farthest first, int32 [ceil(share * n)]."""
    return jax.lax.top_k(distance, math.ceil(share * len(distance)))[1]


def _search(point: jax.Array, books: jax.Array, block: jax.Array, incumbent: jax.Array, width: int) -> jax.Array:
    """Codes int32 [k, M] near points [k, g * d] under codebooks [blocks, M, K, g * d], block [k] of each point."""
    identity = jnp.eye(point.shape[1], dtype=point.dtype)
    if len(books) == 1:
        return beam.search(point, identity, books, beam=width, incumbent=incumbent)

    def one(args):
        point, block, incumbent = args
        return beam.search(point[None], identity, books[block][None], beam=width, incumbent=incumbent[None])[0]

    batch = max(1, _SCORES // (width * books.shape[2]))
    return jax.lax.map(one, (point, block, incumbent), batch_size=min(batch, len(point)))


def _project_codebook(tensor: CodebookTensor, target: jax.Array, config: CodeConfig) -> CodebookTensor:
    (count, rows, columns), (g, d) = tensor.codes.shape, tensor.vector

    def vectors(weight):
        return weight.reshape(rows, g, columns, d).swapaxes(1, 2).reshape(rows * columns, g * d)

    wanted, present = vectors(target), vectors(tensor.dequantize())
    place = _farthest(jnp.sum((wanted - present) ** 2, axis=1), config.share)
    block = (np.arange(rows) * tensor.blocks[0] // rows)[:, None] * tensor.blocks[1]
    block = block + (np.arange(columns) * tensor.blocks[1] // columns)[None, :]
    block = jnp.asarray(block.reshape(-1), jnp.int32)[place]
    scale = jnp.ones(len(place))
    if tensor.scale is not None:
        scale = jnp.broadcast_to(tensor.scale.astype(jnp.float32), (rows, columns)).reshape(-1)[place]
    books = dense(tensor.codebooks).astype(jnp.float32).reshape(-1, count, tensor.codebook_size, g * d)
    codes = tensor.codes.unpack().astype(jnp.int32).reshape(count, -1)
    old, wanted, present = codes[:, place].T, wanted[place], present[place]
    point = wanted / jnp.where(scale == 0, 1, scale)[:, None]
    new = _search(point, books, block, old, config.beam)
    value = books[block[:, None], np.arange(count)[None, :], new].sum(1) * scale[:, None]
    before, after, change = (jnp.sum(x**2, axis=1) for x in (wanted - present, wanted - value, value - present))
    allowed = _allowed(before, after, change, jnp.sum(tensor.dequantize() ** 2), config.trust)
    codes = codes.at[:, place].set(jnp.where(allowed[:, None], new, old).T)
    packed = pack(codes.reshape(count, rows, columns), tensor.codes.bits)
    return dataclasses.replace(tensor, codes=packed)


def _limit(
    old: jax.Array, new: jax.Array, present: jax.Array, value: jax.Array, target: jax.Array, config: CodeConfig
) -> jax.Array:
    """Codes of scalars [rows, n] after the largest changes from `old` (worth `present`) to `new` (worth `value`)."""
    flat = [x.reshape(-1) for x in (old, new, present, value, target)]
    place = _farthest(jnp.abs(flat[4] - flat[2]), config.share)
    kept, wanted_code, now, then, wanted = (x[place] for x in flat)
    allowed = _allowed((wanted - now) ** 2, (wanted - then) ** 2, (then - now) ** 2, jnp.sum(present**2), config.trust)
    return flat[0].at[place].set(jnp.where(allowed, wanted_code, kept)).reshape(old.shape)


def _project_uniform(tensor: UniformTensor, target: jax.Array, config: CodeConfig) -> UniformTensor:
    old = tensor.codes.unpack().astype(jnp.int32)
    scale = jnp.repeat(tensor.scale.astype(jnp.float32), tensor.group_size, axis=1)
    zero = jnp.full_like(scale, 2 ** (tensor.bits - 1))
    if tensor.zero is not None:
        zero = jnp.repeat(tensor.zero.unpack().T.astype(jnp.float32), tensor.group_size, axis=1)
    new = grid.encode(target, scale, zero, tensor.bits)
    codes = _limit(old, new.astype(jnp.int32), tensor.dequantize(), scale * (new - zero), target, config)
    return dataclasses.replace(tensor, codes=pack(codes, tensor.bits))


def _project_trellis(tensor: TiledTensor, target: jax.Array, config: CodeConfig) -> TiledTensor:
    """Whole rings (a class of rows in one column) move, those farthest from the target."""
    classes, (out, n) = tensor.widths.shape[-2], tensor.shape
    runs, table = (
        trellis.rings(class_sizes(out, classes), tensor.state_bits),
        jnp.asarray(trellis.table(tensor.state_bits)),
    )
    rows, columns = tensor.row_order(), tensor.column_order()
    scale = tensor.row_scale.astype(jnp.float32)[rows][:, None] * tensor.column_scale.astype(jnp.float32)[columns][None]
    gains, codes, widths = tensor.levels.astype(jnp.float32), tensor.codes().astype(jnp.int32), tensor.code_widths()
    states = trellis.states(codes, widths, runs, tensor.state_bits)[:, :n]
    present, wanted = gains[widths[:, :n]] * table[states] * scale, target[rows][:, columns]

    distance = jax.ops.segment_sum((wanted - present) ** 2, jnp.asarray(runs.run), classes)
    place = _farthest(distance.reshape(-1), config.share)
    ring, column = place // n, place % n
    row, valid = jnp.asarray(runs.row)[ring], jnp.asarray(runs.valid)[ring]
    where = row, column[:, None]
    width, s = widths[row[:, 0], column], scale[where]
    path = paths(
        wanted[where] / jnp.where(s == 0, 1, s),
        jnp.where(valid, s**2, 0),
        jnp.where(valid, width[:, None], 0),
        gains[width][:, None] * table[None, :],
        states[row[:, -1], column],
        jnp.asarray(runs.closed)[ring],
        widest=tensor.widest,
    )
    value = gains[width][:, None] * table[path] * s
    before, after, change = (
        jnp.sum(jnp.where(valid, x**2, 0), axis=1)
        for x in (wanted[where] - present[where], wanted[where] - value, value - present[where])
    )
    allowed = _allowed(before, after, change, jnp.sum(present**2), config.trust)
    new = jnp.where(allowed[:, None], path & (jnp.left_shift(np.int32(1), width[:, None]) - 1), codes[where])
    words = pack_tiles(
        codes.at[where].set(new), tensor.widths.unpack().astype(jnp.int32), tensor.words.shape[-1], tensor.widest
    )
    return dataclasses.replace(tensor, words=words)


def _project_tiles(tensor: TiledTensor, target: jax.Array, config: CodeConfig) -> TiledTensor:
    if tensor.state_bits:
        return _project_trellis(tensor, target, config)
    rows, columns = tensor.row_order(), tensor.column_order()
    scale = tensor.row_scale.astype(jnp.float32)[rows][:, None] * tensor.column_scale.astype(jnp.float32)[columns][None]
    target = target[rows][:, columns]
    stored = tensor.codes().astype(jnp.int32)  # the last tile may go beyond the last column
    last = jnp.left_shift(np.int32(1), tensor.code_widths()) - 1

    def worth(codes):
        return tensor.code_levels(codes)[:, : len(columns)] * scale

    old, present = stored[:, : len(columns)], worth(stored)
    new, value = old, present
    for step in (-1, 1):
        other = jnp.clip(stored + step, 0, last)
        there = worth(other)
        nearer = jnp.abs(target - there) < jnp.abs(target - value)
        new, value = jnp.where(nearer, other[:, : len(columns)], new), jnp.where(nearer, there, value)
    codes = jnp.pad(_limit(old, new, present, value, target, config), ((0, 0), (0, -len(columns) % TILE)))
    words = pack_tiles(codes, tensor.widths.unpack().astype(jnp.int32), tensor.words.shape[-1], tensor.widest)
    return dataclasses.replace(tensor, words=words)


def project(tensor: Any, target: jax.Array, config: CodeConfig) -> Any:
    """Moves a few codes of a tensor towards a target; its floats stay.

    Args:
      tensor: QuantizedTensor [out, in]; a dense array is returned as it is.
      target: float32 [out, in].
      config: settings; `share`, `trust` and `beam` are used. In a tensor of several parts each has its own share.

    Returns:
      The tensor with new codes; no changed vector is farther from the target than before.

    Raises:
      ValueError: a format that has no rule here.
    """
    if not isinstance(tensor, QuantizedTensor):
        return tensor
    if isinstance(tensor, CodebookTensor):
        return _project_codebook(tensor, target, config)
    if isinstance(tensor, UniformTensor):
        return _project_uniform(tensor, target, config)
    if isinstance(tensor, TiledTensor):
        return _project_tiles(tensor, target, config)
    if isinstance(tensor, ColumnTensor):
        inner = target if tensor.order is None else target[:, unpack_order(tensor.order)]
        inner = inner if tensor.scale is None else inner / tensor.scale.dense()[None, :]
        return dataclasses.replace(tensor, base=project(tensor.base, inner, config))
    if isinstance(tensor, (OutlierTensor, ColumnOutlierTensor)):
        inner = target - (tensor.dequantize() - dense(tensor.base).astype(jnp.float32))
        return dataclasses.replace(tensor, base=project(tensor.base, inner, config))
    if isinstance(tensor, ConcatTensor):
        joined = target if tensor.order is None else jnp.take(target, unpack_order(tensor.order), axis=tensor.axis)
        ends = np.cumsum([part.shape[tensor.axis] for part in tensor.parts])[:-1]
        pieces = jnp.split(joined, ends, axis=tensor.axis)
        parts = tuple(project(p, t, config) for p, t in zip(tensor.parts, pieces, strict=True))
        return dataclasses.replace(tensor, parts=parts)
    raise ValueError(
        f"codes of a {type(tensor).__name__}: expected a format with a rule in jaxquant.projection, got none"
    )
