"""Summing over a cluster of blocks: each block sends its sums to the block that adds them up, and goes on.

Sums arrive in the receiver's shared memory together with a count of bytes on its barrier, so that nobody waits for more
than what it is going to read, and no block leaves before all that others send to it has arrived.
"""

import functools

import jax.numpy as jnp

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels.codebook_matmul.gpu_plan import Plan


class Exchange:
    """One thread's part.

    Args:
      plan: sizes.
      block: index of this block in its cluster.
      inbox: address in shared memory, float32 [cluster, team, token, share].
      barrier: address in shared memory of 8 bytes.
    """

    def __init__(self, plan: Plan, block: t.Value, inbox: t.Value, barrier: t.Value):
        self.plan, self.block, self.inbox, self.barrier = plan, block, inbox, barrier

    @property
    def _slots(self) -> int:
        """Sums that arrive for one output and token."""
        return self.plan.config.cluster * self.plan.config.teams

    def open(self) -> None:
        """Makes all barriers of the cluster ready; all threads of all blocks."""
        expected = 4 * self._slots * self.plan.chunk * self.plan.share
        with t.when(t.less(t.thread_index(), 1)):
            t.expect_bytes(self.barrier, expected)
        t.cluster_barrier()

    def send(self, output: t.Value, team: t.Value, token: int, value: t.Value) -> None:
        """Sends a sum for an output of the cluster to the block that is to add it up."""
        plan = self.plan
        rank, local = t.div(output, plan.share), t.rem(output, plan.share)
        sender = t.add(t.mul(self.block, plan.config.teams), team)
        place = t.add(t.mul(t.add(t.mul(sender, plan.chunk), token), plan.share), local)
        t.send(value, t.of_block(t.at(self.inbox, t.mul(place, 4)), rank), t.of_block(self.barrier, rank))

    def receive(self) -> None:
        """Waits until all sums for this block have arrived."""
        t.wait_bytes(self.barrier)

    def total(self, local: t.Value, token: int) -> t.Value:
        """Adds up what arrived for one of this block's outputs, always in the same order."""
        plan = self.plan
        address = t.at(self.inbox, t.mul(local, 4))
        offsets = [4 * plan.share * (sender * plan.chunk + token) for sender in range(self._slots)]
        return functools.reduce(t.fadd, (t.load(t.at(address, o), jnp.float32)[0] for o in offsets))
