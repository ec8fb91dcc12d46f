"""ditbench: one protocol for post-training quantization of diffusion transformers.

In a checkout `harness`, `methods`, `eval`, `conf` and `results/papers` are links to the folders at its top; a wheel holds the
folders themselves.
"""

from ditbench.harness.common.torchvision_ops import ensure_torchvision_imports

ensure_torchvision_imports()

__version__ = "0.1.0"
