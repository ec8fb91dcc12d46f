"""The harness: its rooms and what flows through them stand in docs/architecture.md."""

if __name__ == "harness":  # the folder itself was found, from the top of a checkout: every module would exist twice
    raise ImportError("import ditbench.harness instead of harness; `pip install -e .` makes it known")
