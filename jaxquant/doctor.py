"""What `jaxquant doctor` says: devices, versions, and what is missing for what."""

import importlib.metadata
import importlib.util
import platform

import jax

from jaxquant import checkpoint
from jaxquant.commands import console

NEEDS = {
    "torch": "checks against torch clients: pip install 'jaxquant[check]'",
    "matplotlib": "plots: pip install 'jaxquant[plots]'",
    "datasets": "calibration on hub datasets: pip install 'jaxquant[datasets]'",
    "libtpu": "TPUs: pip install 'jax[tpu]'",
}


PACKAGES = ("jaxquant", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors")
PACKAGES += ("transformers", "tokenizers", "gguf")


def run() -> None:
    """Prints devices, versions and what is missing."""
    out = console()
    environment = checkpoint.environment()
    out.print(f"python {platform.python_version()}, {platform.platform()}", highlight=False)
    for device in jax.devices():
        out.print(f"device {device.id}: {device.platform} {device.device_kind}", highlight=False)
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # jaxquant itself, run from a checkout
            version = "not installed"
        out.print(f"{name} {version}", highlight=False)
    for name, use in NEEDS.items():
        state = "found" if importlib.util.find_spec(name) else f"missing, needed for {use}"
        out.print(f"{name}: {state}", highlight=False, markup=False)
    if environment["platform"] == "cpu":
        out.print("accelerator: none; GPUs need pip install 'jax[cuda13]'", highlight=False, markup=False)
