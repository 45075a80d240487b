"""Kernels: decode and matmul fused, one folder per operation; installed as `jaxquant.kernels`.

A kernel takes arrays only and imports nothing of jaxquant but this package. In each folder `reference.py` is the
specification, `layout.py` says how the codes lie for the kernels, `api.py` which of them can do what, and `cpu.py`,
`tpu.py`, `gpu.py` for few tokens and `gpu_batch.py` for more are the implementations. Choosing among them, gradients,
and tensors made of several parts are in `jaxquant.ops`.
"""

import jax


def too_old() -> str | None:
    """Says that JAX has no GPU kernels yet; None if it has."""
    return None if jax.__version_info__ >= (0, 11) else f"expected JAX 0.11 or newer, got {jax.__version__}"
