"""One file = one paper. Found by file name, or through the entry point group `ditbench.methods`."""
