"""Kernels: decode and matmul fused, one folder per operation; installed as `jaxquant.kernels`.

A kernel takes arrays only and imports nothing of jaxquant but this package. There is none yet: `jaxquant.matmul`
dequantizes and leaves the product to XLA.
"""
