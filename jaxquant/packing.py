"""Arrays of small unsigned integers, packed without gaps into 32-bit words."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["bits", "length"])
@dataclasses.dataclass(frozen=True)
class PackedArray:
    """Unsigned integers of `bits` bits each, packed along the last axis.

    Value k of a row occupies bits k * bits ... (k + 1) * bits - 1 of the row's little-endian bit stream, that is of
    `words` read in order, least significant bit first; the last word is padded with zeros. This is also the layout of
    compressed-tensors' `pack-quantized` format.

    Attributes:
      words: uint32 [..., ceil(length * bits / 32)].
      bits: width of a value, 1 to 16 (static).
      length: values in a row (static).
    """

    words: jax.Array
    bits: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return (*self.words.shape[:-1], self.length)

    def unpack(self) -> jax.Array:
        """Returns the values, uint8 (up to 8 bits) or uint16, of shape `self.shape`."""
        return _unpack(self.words, self.bits, self.length)


@functools.partial(jax.jit, static_argnames=("bits", "length"))
def _unpack(words: jax.Array, bits: int, length: int) -> jax.Array:
    position = np.arange(length) * bits
    low = position // 32
    shift = (position % 32).astype(np.uint32).reshape((1,) * (words.ndim - 1) + (-1,))
    value = jnp.take(words, low, axis=-1) >> shift
    if 32 % bits:  # some values straddle two words
        high = np.minimum(low + 1, words.shape[-1] - 1)
        # a shift by 32 is undefined, hence the minimum; where nothing straddles, `rest` is not used
        rest = jnp.take(words, high, axis=-1) << np.minimum(32 - shift, 31).astype(np.uint32)
        value = value | jnp.where(shift + bits > 32, rest, jnp.uint32(0))
    return (value & np.uint32(2**bits - 1)).astype(jnp.uint8 if bits <= 8 else jnp.uint16)


@functools.partial(jax.jit, static_argnames="bits")
def pack(values: jax.Array, bits: int) -> PackedArray:
    """Packs integers along the last axis.

    Args:
      values: integers [..., length] in [0, 2**bits); higher bits are dropped.
      bits: 1 to 16.

    Returns:
      PackedArray with words uint32 [..., ceil(length * bits / 32)].

    Raises:
      ValueError: bits out of range.
    """
    if bits not in WIDTHS:
        raise ValueError(f"bits: expected an integer from 1 to 16, got {bits!r}")
    length = values.shape[-1]
    # 32 values fill exactly `bits` words: pad to such chunks, then build the words of a chunk one by one.
    chunks = -(-length // 32)
    pad = [(0, 0)] * (values.ndim - 1) + [(0, chunks * 32 - length)]
    v = jnp.pad(values.astype(jnp.uint32) & np.uint32(2**bits - 1), pad)
    v = v.reshape(*values.shape[:-1], chunks, 32)
    words = []
    for w in range(bits):
        first, last = 32 * w // bits, (32 * w + 31) // bits
        word = jnp.zeros(v.shape[:-1], jnp.uint32)
        for k in range(first, last + 1):
            offset = k * bits - 32 * w
            part = v[..., k] << np.uint32(offset) if offset >= 0 else v[..., k] >> np.uint32(-offset)
            word = word | part
        words.append(word)
    stream = jnp.stack(words, axis=-1).reshape(*values.shape[:-1], chunks * bits)
    return PackedArray(stream[..., : -(-length * bits // 32)], bits, length)


def rounded(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns what `x` is once it was stored in a narrower dtype, float32; numbers beyond its range become its largest.

    The rounding is spelled out, because XLA may drop a conversion and its inverse: on GPUs it does.
    """
    info = jnp.finfo(dtype)
    x = jnp.clip(x.astype(jnp.float32), -float(info.max), float(info.max))
    near = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=info.nmant)
    if info.nexp < 8:  # below the normal numbers of a narrower exponent the spacing is constant
        step = float(info.smallest_subnormal)
        near = jnp.where(jnp.abs(x) < float(info.smallest_normal), jnp.round(x / step) * step, near)
    return near


def saturate(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns floats in a narrower dtype; numbers beyond its range become its largest instead of infinity."""
    return rounded(x, dtype).astype(dtype)
