"""Triton kernels of the CUDA backends, imported when the first layer is built, so that machines without triton are unharmed.

`launch.py` wraps them as torch operators, `layers.py` as kernels of a layer; `ways.py` finds the tile that a device takes. With TRITON_INTERPRET=1 they run on the CPU.
"""
