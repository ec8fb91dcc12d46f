"""`ditbench bench`: what a quantized transformer costs on this device, beside bf16, in one process and interleaved."""

from ditbench.harness.bench.benchmark import Options, bench
from ditbench.harness.bench.show import plot, shown

__all__ = ["Options", "bench", "plot", "shown"]
