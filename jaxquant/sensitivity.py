"""What a layer's error costs the whole model, and the bits for each layer that follow from it.

An error E in the weight of a layer with inputs x changes its outputs by E x, and the divergence between the model's
predictions before and after is, to second order and with outputs taken one by one,

    KL ~ 1/2 sum_o E[g_o^2] (E H E^T)_oo    in nats per token,

with H = E[x x^T] and g the gradient of the loss in the layer's outputs, the labels drawn from the model itself (the
diagonal of the Fisher information of the outputs). Unlike relative errors, these numbers compare across layers.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import pipeline, stats, trees, warmup
from jaxquant.allocate import allocate
from jaxquant.methods import METHODS, Config
from jaxquant.models.base import Model, run_block, run_embed
from jaxquant.plan import abstract_tensor, linear_paths
from jaxquant.problem import LayerProblem, row_objective
from jaxquant.tensors import QuantizedTensor

_CHUNK = 256  # tokens whose logits exist at once
BATCHES = 4  # that one backward pass of `token_importance` goes through


class BlockCosts(NamedTuple):
    """Predicted KL in nats per token of each layer of a block, {path: one number per config}; inf: does not fit."""

    index: int
    costs: dict[str, list[float]]


@functools.partial(jax.jit, static_argnames="model")
def _head_gradient(model: Model, ends: Any, hidden: jax.Array, key: jax.Array) -> jax.Array:
    """Gradient of the summed cross entropy in hidden [batch, time, d], with labels drawn from the model."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk = min(_CHUNK, len(flat))
    padded = jnp.pad(flat, ((0, -len(flat) % chunk), (0, 0))).reshape(-1, chunk, flat.shape[-1])

    def one(args):
        x, key = args
        logits, pull = jax.vjp(lambda x: model.head(ends, x[None])[0].astype(jnp.float32), x)
        labels = jax.random.categorical(key, logits)
        return pull(jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32))[0]

    gradient = jax.lax.map(one, (padded, jax.random.split(key, len(padded))))
    return gradient.reshape(-1, flat.shape[-1])[: len(flat)].reshape(hidden.shape)


@functools.partial(jax.jit, static_argnames=("model", "kind", "axes"), donate_argnames="cotangent")
def block_gradients(
    model: Model, block: Any, hidden: jax.Array, cotangent: jax.Array, *, kind: str, axes: tuple[int, ...]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Gradient in a block's inputs, and squared gradients in each layer's outputs, summed over `axes` of three.

    Args:
      model: pure functions of the network.
      block: parameters of a dense block.
      hidden: its inputs, [batch, time, hidden_size].
      cotangent: gradient in its outputs, of the same shape; given away.
      kind: of the block.
      axes: of outputs [batch, time, out].

    Returns:
      (gradient [batch, time, hidden_size], {layer: float32, what is left of [batch, time, out]}).
    """
    names = [name for group in model.groups for name in group]
    layers = {name: trees.get(block, name) for name in names}
    # A bias of its own for every token stands for the layer's outputs.
    shapes = {name: (*hidden.shape[:2], layer["weight"].shape[0]) for name, layer in layers.items()}
    taps = {
        name: jnp.broadcast_to(layers[name].get("bias", jnp.zeros((), hidden.dtype)), shape)
        for name, shape in shapes.items()
    }

    def run(hidden, taps):
        tapped = trees.update(block, {name: {**layers[name], "bias": tap} for name, tap in taps.items()})
        return model.block(tapped, hidden, kind)

    _, pull = jax.vjp(run, hidden, taps)
    gradient, outputs = pull(cotangent)
    return gradient, {name: jnp.sum(g.astype(jnp.float32) ** 2, axis=axes) for name, g in outputs.items()}


@jax.jit
@jax.default_matmul_precision("highest")
def predicted_kl(problem: LayerProblem, tensor: QuantizedTensor | jax.Array, squares: jax.Array) -> jax.Array:
    """Returns 1/2 sum_o squares_o (E H E^T)_oo of E = tensor - weight, in nats per token; `squares` is E[g^2] [out]."""
    dense = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
    return jnp.sum(row_objective(dense - problem.weight, problem.hessian) * squares) / 2


def _backward(
    model: Model, params: Any, tokens: np.ndarray, key: jax.Array, batch_size: int, axes: tuple[int, ...]
) -> Iterator[tuple[int, list[jax.Array], list[dict[str, jax.Array]]]]:
    """One backward pass through a dense model, labels drawn from it.

    Yields:
      (index, inputs, squared gradients as of `block_gradients`) of each block, in batches, from the last to the first.
    """
    ends, kinds = {name: value for name, value in params.items() if name != "blocks"}, model.config.layer_kinds
    inputs: list[list[jax.Array]] = []
    hidden = [run_embed(model, ends, tokens[i : i + batch_size]) for i in range(0, len(tokens), batch_size)]
    for kind, block in zip(kinds, params["blocks"], strict=True):
        inputs.append(hidden)
        hidden = [run_block(model, block, jnp.copy(h), kind=kind) for h in hidden]
    keys = jax.random.split(key, len(hidden))
    cotangents = [_head_gradient(model, ends, h, k) for h, k in zip(hidden, keys, strict=True)]
    for index in reversed(range(len(params["blocks"]))):
        block, kind, hidden = params["blocks"][index], kinds[index], inputs.pop()
        run = functools.partial(block_gradients, model, block, kind=kind, axes=axes)
        both = [run(h, c) for h, c in zip(hidden, cotangents, strict=True)]
        cotangents = [gradient for gradient, _ in both]
        yield index, hidden, [squares for _, squares in both]


def token_importance(
    model: Model, params: Any, tokens: np.ndarray, *, key: jax.Array, batch_size: int = 8
) -> list[dict[str, np.ndarray]]:
    """How much each token's output of each layer matters to the predictions: weights for the layer's second moments.

    The weight of a token is the root mean square of the loss's gradient in the layer's outputs there, relative to the
    mean over tokens; labels are drawn from the model. With it, a layer's objective no longer counts errors on tokens that
    nothing downstream looks at. For a few batches at a time, the inputs of all blocks are held.

    Args:
      model: pure functions of the network; a layer must accept a bias of shape [batch, time, out].
      params: its dense parameters.
      tokens: integers [n, length].
      key: draws the labels.
      batch_size: sequences per forward pass.

    Returns:
      For each block {layer: float32 [n, length]}, means 1.

    Reference: Kim et al., GuidedQuant, https://arxiv.org/abs/2505.07004, with one group of outputs. Differs from it: the
    root of their weight. The squares have heavy tails (in some layers 1 % of the tokens hold 97 % of them), so few tokens
    would decide.
    """
    tokens, at_once = np.asarray(tokens, np.int32), BATCHES * batch_size
    names = [name for group in model.groups for name in group]
    found = [{name: np.zeros(tokens.shape, np.float32) for name in names} for _ in params["blocks"]]
    for start in range(0, len(tokens), at_once):
        some, own = tokens[start : start + at_once], jax.random.fold_in(key, start)
        for index, _, squares in _backward(model, params, some, own, batch_size, axes=(2,)):
            for name in names:
                norm = np.sqrt(np.concatenate([np.asarray(s[name]) for s in squares]))
                found[index][name][start : start + at_once] = norm
    tiny = np.finfo(np.float32).tiny
    return [{name: norm / max(norm.mean(), tiny) for name, norm in layers.items()} for layers in found]


def layer_costs(
    model: Model,
    params: Any,
    tokens: np.ndarray,
    configs: Sequence[Config],
    *,
    key: jax.Array,
    batch_size: int = 8,
    skip: Sequence[str] = (),
    done: Sequence[int] = (),
) -> Iterator[BlockCosts]:
    """Measures what each of several settings would cost in each layer of a dense model, other layers left as they are.

    One backward pass gives all gradients; then each layer is quantized with each of `configs` on the dense model's
    activations. The inputs of all blocks are held at once: blocks * tokens * hidden_size numbers.

    Args:
      model: pure functions of the network; a layer must accept a bias of shape [batch, time, out].
      params: its dense parameters.
      tokens: integers [n, length]; a few sequences are enough.
      configs: settings to try, of any methods.
      key: draws labels and seeds the methods, by path.
      batch_size: sequences per forward pass.
      skip: paths of layers to leave out.
      done: blocks to leave out, because their costs are known.

    Yields:
      BlockCosts, from the last block to the first.
    """
    shapes = dict.fromkeys(_shape(params, path) for path in linear_paths(model, params) if path not in skip)
    warmup.call_all(functools.partial(_cost_of_zeros, shape, c, key) for shape in shapes for c in configs)
    tokens = np.asarray(tokens, np.int32)
    kinds, count = model.config.layer_kinds, tokens.size
    for index, hidden, gradients in _backward(model, params, tokens, key, batch_size, axes=(0, 1)):
        block, kind = params["blocks"][index], kinds[index]
        if index in done:
            continue
        costs = {}
        for group in model.groups:
            paths = {f"blocks/{index}/{name}": name for name in group}
            if all(path in skip for path in paths):
                continue
            gram = stats.init(trees.get(block, group[0])["weight"].shape[1])
            for h in hidden:
                gram = stats.capture_update(model, block, h, gram, kind=kind, group=group)
            gram = gram[0]
            for path, name in paths.items():
                if path not in skip:
                    problem = LayerProblem(trees.get(block, name)["weight"].astype(jnp.float32), gram / count)
                    squares = functools.reduce(jnp.add, (s[name] for s in gradients)) / count
                    own = pipeline.layer_key(key, path)
                    costs[path] = [_cost(problem, squares, config, own) for config in configs]
        yield BlockCosts(index, costs)


def _shape(params: Any, path: str) -> tuple[int, int]:
    out, n = trees.get(params, path)["weight"].shape
    return out, n


@functools.cache
def _bits(shape: tuple[int, int], config: Config) -> int | None:
    """Storage bits of a layer [out, in]; None if the settings do not fit it."""
    try:
        return abstract_tensor(shape, config).storage_bits()
    except ValueError:
        return None


def _cost(problem: LayerProblem, squares: jax.Array, config: Config, key: jax.Array) -> float:
    out, n = problem.weight.shape
    if _bits((out, n), config) is None:
        return float("inf")
    return float(predicted_kl(problem, METHODS[type(config)](problem, config, key=key), squares))


def _cost_of_zeros(shape: tuple[int, int], config: Config, key: jax.Array) -> float:
    out, n = shape
    return _cost(LayerProblem(jnp.zeros((out, n)), jnp.eye(n)), jnp.ones(out), config, key)


def allocate_layers(
    costs: Mapping[str, Sequence[float]], params: Any, configs: Sequence[Config], average_bits: float
) -> dict[str, Config]:
    """Chooses settings for every layer so that the predicted KL is least for the bits that all layers take together.

    Args:
      costs: {path: predicted KL with each of `configs`}, from `layer_costs`; inf forbids.
      params: the dense parameters, for shapes.
      configs: the settings to choose from.
      average_bits: storage bits of all layers over all their weights.

    Returns:
      {path: settings}.

    Raises:
      ValueError: the cheapest settings need more.
    """
    shapes = {path: _shape(params, path) for path in costs}
    sizes = np.asarray([np.prod(shape) for shape in shapes.values()], np.float64)
    bits = np.asarray([[_bits(shape, config) or 0 for config in configs] for shape in shapes.values()], np.float64)
    table = np.asarray(list(costs.values()), np.float32)
    least = np.where(np.isfinite(table), bits, np.inf).min(axis=1).sum() / sizes.sum()
    if least > average_bits:
        raise ValueError(
            f"average_bits: expected at least {least:.4f}, the least that these settings need, got {average_bits}"
        )
    # Sizes relative to the largest, which float32 sums to well under a bit per thousand weights.
    choice = allocate(
        jnp.asarray(table),
        jnp.asarray(sizes / sizes.max(), jnp.float32),
        jnp.asarray(bits / sizes[:, None], jnp.float32),
        float(average_bits * sizes.sum() / sizes.max() * (1 - 1e-6)),
    )
    return {path: configs[i] for path, i in zip(costs, np.asarray(choice).tolist(), strict=True)}
