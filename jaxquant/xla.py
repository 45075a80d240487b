"""Settings of the compiler for whole runs."""

import os


def compile_fast() -> None:
    """Tells XLA not to try its own matmul kernels on GPUs, unless $XLA_FLAGS says so; call before JAX is first used.

    A run compiles a few dozen programs and calls each a few thousand times: on an H200 choosing among generated kernels
    took 20 of the 28 seconds before the first block was done, and made nothing faster.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_triton_gemm" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_triton_gemm=false".strip()
