"""The command line: `ditbench COMMAND`; each command is a file of this folder with `command(arguments) -> exit code`."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback

from ditbench.harness import cli
from ditbench.harness.cli.flags import own_folders
from ditbench.harness.common.errors import EXIT_USER, UserError, lines_of, of_the_system, unknown_name
from ditbench.harness.common.imports import leave_out_warnings_of_others
from ditbench.harness.common.interrupts import Terminated, exit_code, terminable
from ditbench.harness.common.paths import configurations_in

HELP = """\
ditbench: one protocol for post-training quantization of diffusion transformers.

  ditbench run method=smoothquant bits=w4a8 model=tiny-dit       one run
  ditbench run -m method=rtn,smoothquant,quarot bits=w8a8,w4a4   a sweep (every combination)
  ditbench run … --plan                                          what that would take: operations, time, memory, disk
  ditbench run experiment=demo                                   a sweep from conf/experiment/
  ditbench status EXPERIMENT                                     what runs, is done, failed or never came
  ditbench retry EXPERIMENT [--failed|--missing]                 again what failed or never came
  ditbench report --format html                                  tables and plots of what was recorded
  ditbench compare EXPERIMENT --metric psnr                      paired tests between methods, prompt by prompt
  ditbench export RUN|EXPERIMENT --out FOLDER                    a quantized transformer that plain diffusers can load
  ditbench list methods|models|metrics|prompts|…                 what there is
  ditbench paper list|show NAME                                  numbers as papers report them, with their sources
  ditbench reproduce NAME --plan|--model tiny-dit                a paper's table, run here and held against it
  ditbench parity model=tiny-dit                                 integer kernels held against simulated execution
  ditbench bench model=dit-xl-2-256-random                       latency and memory against bf16, in one process
  ditbench check-method NAME                                     does a method keep the contract?
  ditbench data list|fetch NAME|verify [NAME]                    prompt sets, reference batches and judges of others
  ditbench evaluate EXPERIMENT --metrics NAME …                  other metrics of finished runs, without drawing again
  ditbench cache ls|size|verify|prune                            what runs keep so that nothing is made twice
  ditbench vbench RUN_FOLDER|EXPERIMENT                          official VBench on recorded videos, beside the record
  ditbench wandb sync|workspace EXPERIMENT                       send what was logged offline; make dashboards of it
  ditbench doctor                                                what this machine can do, and what is missing
  ditbench zoo train tiny-dit                                    train an embedded model again

Any value of the configuration can be overridden as name=value, in Hydra's syntax: protocol.n=1000 device=cuda
method.strength=0.6 generate.batch_size=128. `ditbench run --cfg job` prints the whole configuration.
Results go to ./results (results_dir=...). A run that is already recorded is skipped; --force runs it again.
--strict refuses a run of which a metric would be skipped. --config-dir FOLDER: FOLDER/model/mine.yaml is model=mine.
"""
OURS = ("command_line", "flags")  # files of this folder that are no commands
COMMANDS = tuple(m.name.replace("_", "-") for m in pkgutil.iter_modules(cli.__path__) if m.name not in OURS)


def main(argv: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(HELP)
        return 0
    debug = "--debug" in rest or "debug=true" in rest
    if not debug:
        leave_out_warnings_of_others()
    try:
        if command == "--version":
            import ditbench

            print(f"ditbench {ditbench.__version__}")
            return 0
        if command not in COMMANDS:
            raise unknown_name("command", command, COMMANDS)
        rest, folders = own_folders(rest)
        with terminable(), configurations_in(folders):
            return importlib.import_module(f"{cli.__name__}.{command.replace('-', '_')}").command(rest)
    except UserError as error:
        if debug:
            raise
        print(f"ditbench: {lines_of(error)}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt as interrupt:
        what = "asked to end" if isinstance(interrupt, Terminated) else "interrupted"
        print(f"ditbench: {what}; finished runs are recorded, start the same command again to go on", file=sys.stderr)
        return exit_code(interrupt)
    except BrokenPipeError:
        return 0
    except OSError as error:
        if debug:
            raise
        print(f"ditbench: {lines_of(of_the_system(error))}", file=sys.stderr)
        return EXIT_USER


def entry() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes two lines per run to stderr
    try:
        sys.exit(main())
    except (UserError, OSError):  # --debug lets them through
        traceback.print_exc()
        sys.exit(EXIT_USER)


if __name__ == "__main__":
    entry()
