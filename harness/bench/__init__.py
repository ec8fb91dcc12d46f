"""`ditbench bench`: what a quantized transformer costs on this device, beside bf16, in one process and interleaved."""

from harness.bench.run import Options, bench
from harness.bench.show import plot, shown

__all__ = ["Options", "bench", "plot", "shown"]
