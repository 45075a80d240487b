"""Train Flax models whose linear weights are quantized tensors: `python -m experiments.flax_training`.

A two-layer network with additive codebooks (AQLM) learns a regression task again after quantization: codebooks, scales
and low-rank factors move, codes do not. The same training runs in Flax NNX and in Flax Linen, on one device and
data-parallel over four; on a CPU, four devices are made up.
"""

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant.flax_layers import Codes, LinenQuantizedLinear, QuantizedLinear

WIDTHS, WINDOWS, STEPS, RANK = (16, 16, 16), 64, 30, 2
OPTIMIZER = optax.adam(3e-3)


def make_task() -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Returns the dense weights [out, in], inputs [n, in], and the dense network's outputs [n, out]."""
    rng = np.random.default_rng(0)
    weights = [
        jnp.asarray(rng.standard_normal((out, n)) / np.sqrt(n), jnp.float32) for n, out in itertools.pairwise(WIDTHS)
    ]
    x = jnp.asarray(rng.standard_normal((WINDOWS, WIDTHS[0])), jnp.float32)
    return weights, x, jax.nn.silu(x @ weights[0].T) @ weights[1].T


def quantize(weights: list[jax.Array]) -> list[jq.QuantizedTensor]:
    """Quantizes each weight to two codebooks of 16 vectors of 4 columns."""
    config = jq.AQLMConfig(2, 4, 4, 1, rounds=0, iterations=2)
    problems = [jq.LayerProblem(w, jnp.eye(w.shape[1], dtype=jnp.float32)) for w in weights]
    return [jq.aqlm(p, config, key=jax.random.key(0)) for p in problems]


class NNXNetwork(nnx.Module):
    """Two quantized layers with SiLU in between, in Flax NNX."""

    def __init__(self, tensors: list[jq.QuantizedTensor], rngs: nnx.Rngs):
        self.first = QuantizedLinear(tensors[0], rank=RANK, rngs=rngs)
        self.second = QuantizedLinear(tensors[1], rank=RANK, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [n, out] for x [n, in]."""
        return self.second(jax.nn.silu(self.first(x)))


class LinenNetwork(linen.Module):
    """The same in Flax Linen."""

    tensors: tuple[jq.QuantizedTensor, ...]

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [n, out] for x [n, in]."""
        x = jax.nn.silu(LinenQuantizedLinear(self.tensors[0], RANK)(x))
        return LinenQuantizedLinear(self.tensors[1], RANK)(x)


def train(forward: Any, params: Any, codes: Any, x: jax.Array, y: jax.Array, devices: list[Any]) -> tuple[Any, Any]:
    """Trains `params` by Adam, the batch spread over the devices; returns (params, losses float32 [steps])."""
    mesh = Mesh(np.asarray(devices), ("data",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    params, codes = jax.device_put((params, codes), everywhere)
    x, y = jax.device_put((x, y), split)

    @jax.jit
    def run(params, codes, x, y):
        def step(carry, _):
            params, state = carry
            loss, gradient = jax.value_and_grad(lambda p: jnp.mean((forward(p, codes, x) - y) ** 2))(params)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = OPTIMIZER.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = jax.lax.scan(step, (params, OPTIMIZER.init(params)), length=STEPS)
        return params, losses

    return run(params, codes, x, y)


def main() -> dict[str, list[float]]:
    """Trains both networks on one and on four devices; returns the losses of each, and prints first and last."""
    weights, x, y = make_task()
    tensors = quantize(weights)
    network = NNXNetwork(tensors, nnx.Rngs(0))
    graph, params, codes = nnx.split(network, nnx.Param, Codes)
    linen_network = LinenNetwork(tuple(tensors))
    variables = linen_network.init(jax.random.key(0), x)
    models = {
        "nnx": (lambda p, c, x: nnx.merge(graph, p, c)(x), params, codes),
        "linen": (
            lambda p, c, x: linen_network.apply({"params": p, "codes": c}, x),
            variables["params"],
            variables["codes"],
        ),
    }
    losses = {}
    for name, (forward, p, c) in models.items():
        for count in (1, 4):
            _, values = train(forward, p, c, x, y, jax.devices()[:count])
            losses[f"{name} on {count}"] = np.asarray(values).tolist()
    for name, values in losses.items():
        print(f"{name}: loss {values[0]:.5f} -> {values[-1]:.5f}")
    print(json.dumps(losses))
    return losses


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    main()
