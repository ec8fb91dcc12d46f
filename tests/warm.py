"""Processes that begin where seconds of importing end: each is a fork of one that has imported what `ditbench run` needs and done
nothing else.

For commands that have to be processes of their own (their exit code, all of their stderr, another path of modules) and where
how they import is not the point.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVER = """
import importlib, json, os, sys
for name in ("ditbench.harness.sweep.launch", "ditbench.harness.models.families.dit"):
    importlib.import_module(name)
from ditbench.harness.cli import entry
for line in sys.stdin:
    arguments, cwd, path, environment, streams = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = path
        sys.argv[1:] = arguments
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, file in zip((1, 2), streams):
            os.dup2(os.open(file, os.O_WRONLY), stream)
        entry()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Warm:
    """options: of the interpreter; environment: of the process that imports. It ends when whoever made it does."""

    def __init__(self, *options: str, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *options, "-c", SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def __call__(
        self, *arguments: str, cwd: Path, environment: Mapping[str, str], path: Sequence[Path] = ()
    ) -> subprocess.CompletedProcess[str]:
        """`ditbench ARGUMENTS` there. path: folders that modules are looked for in first."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            job = [arguments, str(cwd), [*map(str, path)], dict(environment), [out.name, err.name]]
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(["ditbench", *arguments], code, out.read(), err.read())
