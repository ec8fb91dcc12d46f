"""ditbench: one protocol for post-training quantization of diffusion transformers."""

from harness.torchvision_ops import ensure_torchvision_imports

ensure_torchvision_imports()

__version__ = "0.1.0"
