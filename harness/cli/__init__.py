"""The command line. In a test or a notebook: `ditbench.harness.cli.main(["run", "method=rtn", …])` → exit code."""

from ditbench.harness.cli.command_line import entry, main

__all__ = ["entry", "main"]
