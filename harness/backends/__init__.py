"""How a quantized layer executes. One file per backend; `harness.backends.base.choose` picks one per layer."""
