"""How a product with additive codes is divided on a GPU: what is known when the kernel is compiled."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxquant.kernels.codebook_matmul.layout import LANES, SET

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


def block_config(total_sets: int, out: int, chunk: int) -> BlockConfig:
    """The default division for `chunk` tokens in a block: as many clusters as run at once, one wave of them.

    A second wave would double the time. More sets in a block mean fewer blocks whose sums must be added up, and tables
    that serve fewer outputs; two are what one pass over a model's usual 4096 inputs takes with two codebooks.
    """
    cluster = 8
    sets = max(1, min(TABLES // chunk, 2, -(-total_sets // cluster)))
    width = -(-out // (CLUSTERS * LANES)) * LANES
    rest = SHARED_BYTES - sets * chunk * TABLE_BYTES - SHARED_ALIGNMENT  # for sums, twice; the last array is a barrier
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
      out: outputs.
      dimension: d.
      count: M, codebooks.
      entries: K, of a codebook.
      total_sets: sets of slots.
      scale: "rows", "columns" or None.
      dtypes: of "x", "books", "scale" and "y".
    """

    config: BlockConfig
    tokens: int
    chunk: int
    columns: int
    out: int
    dimension: int
    count: int
    entries: int
    total_sets: int
    scale: str | None
    dtypes: dict[str, Any]

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
        """Clusters along the outputs, and chunks of tokens."""
        return -(-self.out // self.config.width), -(-self.tokens // self.chunk)


def make_plan(
    x: Any, words: Any, codebooks: Any, scale: Any, *, dimension: int, dtype: Any, config: BlockConfig | None
) -> Plan:
    """The plan for `gpu.lookup_matmul` with these arrays, of which shapes and dtypes suffice."""
    (tokens, columns), (lines, out, _) = x.shape, words.shape
    chunk = -(-tokens // -(-tokens // _TOKENS))
    by = None if scale is None else "rows" if scale.shape[1] == 1 else "columns"
    dtypes = {"x": x.dtype, "books": codebooks.dtype, "y": jnp.dtype(dtype)}
    if scale is not None:
        dtypes["scale"] = scale.dtype
    return Plan(
        config=config or block_config(lines // 4, out, chunk),
        tokens=tokens,
        chunk=chunk,
        columns=columns,
        out=out,
        dimension=dimension,
        count=len(codebooks),
        entries=codebooks.shape[1] // dimension,
        total_sets=lines // 4,
        scale=by,
        dtypes=dtypes,
    )
