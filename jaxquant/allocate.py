"""Bits under a budget: each unit, be it a channel, a tile or a layer, takes one of several widths."""

import functools

import jax
import jax.numpy as jnp

_STEPS = 60


@functools.partial(jax.jit)
def allocate(cost: jax.Array, sizes: jax.Array, bits: jax.Array, budget: jax.Array | float) -> jax.Array:
    """Chooses a width for every unit so that the total cost is least.

    Minimises sum_i cost[i, choice_i] subject to sum_i sizes[i] * bits[i, choice_i] <= budget. A price per bit is bisected
    until the units' own best choices just fit; what is left of the budget is spent on single upgrades, the largest
    saving per bit first. Exact where the budget falls on the lower convex hull of all allocations, otherwise off by
    less than one unit's step on it.

    Args:
      cost: float32 [n, B], the cost of unit i at option o; need be neither convex nor decreasing. inf forbids an
        option.
      sizes: float32 [n], > 0: weights of a unit.
      bits: float32 [n, B], or [B] if alike for all units: bits per weight of an option, any order.
      budget: total bits, scalar. If not even the cheapest options fit, those are returned.

    Returns:
      int32 [n], options.
    """
    _check(cost, sizes, bits)
    bits = jnp.broadcast_to(bits.astype(jnp.float32), cost.shape)
    used = sizes[:, None] * bits
    limit = jnp.float32(budget)
    units = jnp.arange(len(sizes))

    def best(price):
        return jnp.argmin(cost + price * used, axis=1)

    def spent(choice):
        return used[units, choice].sum()

    def halve(_, prices):
        low, high = prices
        middle = jnp.sqrt(low * high)
        fits = spent(best(middle)) <= limit
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    # Prices are searched by ratio: from one at which bits are all but free to one at which a bit costs more than it
    # can save.
    finite = jnp.where(jnp.isfinite(cost), cost, 0)
    spread = jnp.maximum(finite.max() - finite.min(), jnp.finfo(jnp.float32).tiny)
    gaps = jnp.diff(jnp.sort(bits, axis=1), axis=1)
    step = jnp.min(jnp.where(gaps > 0, gaps, jnp.inf)) * sizes.min()
    high = 2 * spread / jnp.where(jnp.isfinite(step), step, 1)
    low = jnp.maximum(high * 1e-18, jnp.finfo(jnp.float32).tiny)
    _, price = jax.lax.fori_loop(0, _STEPS, halve, (low, high))
    cheapest = jnp.argmin(jnp.where(jnp.isfinite(cost), used, jnp.inf), axis=1)
    choice = best(price)
    choice = jnp.where(spent(choice) <= limit, choice, cheapest)
    return _fill(cost, used, limit, choice).astype(jnp.int32)


def _check(cost: jax.Array, sizes: jax.Array, bits: jax.Array) -> None:
    """Raises ValueError unless the shapes fit together."""
    if cost.ndim != 2 or sizes.shape != cost.shape[:1] or bits.shape not in (cost.shape[1:], cost.shape):
        raise ValueError(
            "allocate: expected cost [n, B], sizes [n] and bits [B] or [n, B], "
            f"got {cost.shape}, {sizes.shape} and {bits.shape}"
        )


def _fill(cost: jax.Array, used: jax.Array, budget: jax.Array, choice: jax.Array) -> jax.Array:
    """Upgrades single units while one fits, each time the one that saves most per bit; returns the choices."""
    units = jnp.arange(len(choice))

    def proposal(choice):
        now, paid = cost[units, choice][:, None], used[units, choice]
        extra = used - paid[:, None]
        saving = now - cost
        allowed = (saving > 0) & (extra <= budget - paid.sum())
        # Savings that need no more bits come first; cost inf is never entered, and is left at any price.
        worth = jnp.where(extra > 0, saving / jnp.where(extra > 0, extra, 1), jnp.inf)
        return jnp.where(allowed, worth, -jnp.inf)

    def upgrade(state):
        choice, worth = state
        unit, option = jnp.unravel_index(jnp.argmax(worth), worth.shape)
        choice = choice.at[unit].set(option.astype(choice.dtype))
        return choice, proposal(choice)

    def any_left(state):
        return (state[1] > -jnp.inf).any()

    return jax.lax.while_loop(any_left, upgrade, (choice, proposal(choice)))[0]
