"""The quantization algebra that every method uses: specs, quantizers, transforms, recipes, layers, accounting."""
