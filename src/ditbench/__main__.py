"""`python -m ditbench`, the same as the command `ditbench`."""

from ditbench.harness.cli import entry

if __name__ == "__main__":
    entry()
