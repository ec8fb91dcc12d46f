"""One file = one paper. Found by file name, or through the entry point group `ditbench.methods`."""

if __name__ == "methods":  # the folder itself was found, from the top of a checkout: every module would exist twice
    raise ImportError("import ditbench.methods instead of methods; `pip install -e .` makes it known")
