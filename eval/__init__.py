"""Metrics: one file a family of metrics."""

if __name__ == "eval":  # the folder itself was found, from the top of a checkout: every module would exist twice
    raise ImportError("import ditbench.eval instead of eval; `pip install -e .` makes it known")
