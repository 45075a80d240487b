"""How a product with additive codes is divided on a GPU: what is known when the kernel is compiled."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.kernels.codebook_matmul.layout import LANES, SET, Weight
from jaxquant.prologue import Gate, Prologue, RMSNorm

WARPGROUP, WARP = 128, 32  # threads
ROW_BYTES = 4 * SET  # of a table: the partial products of one code with all slots of a set
TABLE_BYTES = 256 * ROW_BYTES
TABLES = 3  # that fit in shared memory
_TOKENS = 2  # that share a block: three leave room for fewer outputs, of which there then are two waves
SHARED_BYTES = 226 * 1024  # of a block; with 227 KB, all that there is, a launch is refused
SHARED_ALIGNMENT = 1024  # of each array
CLUSTERS = 15  # of 8 blocks that run at once on 132 multiprocessors, which come in parts of 16 or fewer


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How the work is divided.

    Attributes:
      warpgroups: of 128 threads in a block.
      cluster: blocks that divide the inputs.
      sets: sets of slots in a pass.
      teams: of warpgroups that divide the sets of a pass; a thread has an output and the sets of its team.
      width: outputs of a cluster, a multiple of 32.
      ahead: loads of a thread that are under way, each of an output's codes of the sets of a team.
      overlap: start while the kernel before is finishing; its results are awaited before anything is read.
    """

    warpgroups: int
    cluster: int
    sets: int
    teams: int
    width: int
    ahead: int = 1
    overlap: bool = True


def block_config(total_sets: int, outs: Sequence[int], chunk: int) -> BlockConfig:
    """The default division for `chunk` tokens in a block: as many clusters as run at once, one wave of them.

    A cluster has outputs of one weight, of which there may be several with the same inputs.

    A second wave would double the time. More sets in a block mean fewer blocks whose sums must be added up, and tables
    that serve fewer outputs; two are what one pass over a model's usual 4096 inputs takes with two codebooks.
    """
    cluster = 8
    sets = max(1, min(TABLES // chunk, 2, -(-total_sets // cluster)))
    width = -(-sum(outs) // (CLUSTERS * LANES)) * LANES
    while len(outs) < CLUSTERS < sum(-(-out // width) for out in outs):
        width += LANES
    # What is left for sums, twice, beside sums of squares and a barrier.
    rest = SHARED_BYTES - sets * chunk * TABLE_BYTES - 2 * SHARED_ALIGNMENT
    most = rest // 2 // SHARED_ALIGNMENT * SHARED_ALIGNMENT // (4 * chunk)  # outputs
    width = min(width, most // LANES * LANES)
    return BlockConfig(3 if width <= 3 * WARPGROUP else 4, cluster, sets, 1, width)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one product.

    Attributes:
      config: division of the work.
      tokens: rows of x.
      chunk: tokens that share a block.
      columns: in.
      outs: outputs of each weight.
      dimension: d.
      count: M, codebooks.
      entries: K, of a codebook.
      total_sets: sets of slots.
      scale: "rows", "columns" or None.
      norm: eps and offset, if the prologue is an RMSNorm.
      activation: if the prologue is a Gate.
      dtypes: of "x", "books", "y", and of "scale", "prologue" (norm's weight or gate) and "residual" if there are such.
    """

    config: BlockConfig
    tokens: int
    chunk: int
    columns: int
    outs: tuple[int, ...]
    dimension: int
    count: int
    entries: int
    total_sets: int
    scale: str | None
    norm: tuple[float, float] | None
    activation: str | None
    dtypes: dict[str, Any]

    def size(self, name: str) -> int:
        """Bytes of an element."""
        return jnp.dtype(self.dtypes[name]).itemsize

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARPGROUP * self.config.warpgroups

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.threads // WARP

    @property
    def members(self) -> int:
        """Threads of a team."""
        return self.threads // self.config.teams

    @property
    def own_sets(self) -> int:
        """Sets of a team in a pass."""
        return self.config.sets // self.config.teams

    @property
    def passes(self) -> int:
        """Times that a block builds its tables."""
        return -(-self.total_sets // (self.config.cluster * self.config.sets))

    @property
    def room(self) -> int:
        """Sets that all blocks of a cluster have room for, in all passes."""
        return self.config.cluster * self.passes * self.config.sets

    @property
    def tiles(self) -> int:
        """Outputs of a thread."""
        return -(-self.config.width // self.members)

    @property
    def share(self) -> int:
        """Outputs that a block sums over its cluster."""
        return self.config.width // self.config.cluster

    @property
    def total_groups(self) -> int:
        """Groups of inputs, in / d."""
        return self.columns // self.dimension

    @property
    def groups(self) -> int:
        """Groups of inputs in a set."""
        return SET // self.count

    @property
    def sums(self) -> int:
        """Sums of a block, one per token, team and output."""
        return self.chunk * self.config.teams * self.config.width

    @property
    def grid(self) -> tuple[int, int]:
        """Clusters along the outputs of all weights, and chunks of tokens."""
        return sum(map(self.clusters, self.outs)), -(-self.tokens // self.chunk)

    def clusters(self, out: int) -> int:
        """Clusters of a weight."""
        return -(-out // self.config.width)


def make_plan(
    x: Any,
    weights: Sequence[Weight],
    prologue: Prologue | None = None,
    residual: Any = None,
    *,
    dimension: int,
    dtype: Any,
    config: BlockConfig | None = None,
) -> Plan:
    """The plan for `gpu.lookup_matmul` with these arrays, of which shapes and dtypes suffice; weights are `layout.alike`."""
    (tokens, columns), (words, books, _) = x.shape, weights[0]
    outs = tuple(words.shape[1] for words, _, _ in weights)
    chunk = -(-tokens // -(-tokens // _TOKENS))
    return Plan(
        config=config or block_config(len(words) // 4, outs, chunk),
        tokens=tokens,
        chunk=chunk,
        columns=columns,
        outs=outs,
        dimension=dimension,
        count=len(books),
        entries=books.shape[1] // dimension,
        total_sets=len(words) // 4,
        **traits(x, weights, prologue, residual, dtype),
    )


def traits(x: Any, weights: Sequence[Weight], prologue: Prologue | None, residual: Any, dtype: Any) -> dict[str, Any]:
    """Fields of a plan: scale, norm, activation and dtypes."""
    _, books, scale = weights[0]
    arrays = {"x": x, "books": books, "scale": scale, "residual": residual}
    arrays["prologue"] = None if prologue is None else jax.tree.leaves(prologue)[0]
    dtypes = {name: array.dtype for name, array in arrays.items() if array is not None}
    return {
        "scale": None if scale is None else "columns" if scale.shape[1] > 1 else "rows",
        "norm": (prologue.eps, prologue.offset) if isinstance(prologue, RMSNorm) else None,
        "activation": prologue.activation if isinstance(prologue, Gate) else None,
        "dtypes": dtypes | {"y": jnp.dtype(dtype)},
    }
