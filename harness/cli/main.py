"""The command line: `ditbench COMMAND`; one function per command, each thin."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ditbench.harness.common.errors import UserError, of_the_system

HELP = """\
ditbench: one protocol for post-training quantization of diffusion transformers.

  ditbench run method=smoothquant bits=w4a8 model=tiny-dit       one run
  ditbench run -m method=rtn,smoothquant,quarot bits=w8a8,w4a4   a sweep (every combination)
  ditbench run experiment=demo                                   a sweep from conf/experiment/
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
  ditbench vbench RUN_FOLDER|EXPERIMENT                          official VBench on recorded videos, beside the record
  ditbench doctor                                                what this machine can do, and what is missing
  ditbench zoo train tiny-dit                                    train an embedded model again

Any value of the configuration can be overridden as name=value, in Hydra's syntax: protocol.n=1000 device=cuda
method.strength=0.6 generate.batch_size=128. `ditbench run --cfg job` prints the whole configuration.
Results go to ./results (results_dir=...). A run that is already recorded is skipped; --force runs it again.
--strict refuses a run, before anything is computed, if one of its metrics would be skipped.
"""
EXIT_USER = 2
EXIT_FAILED_RUNS = 3


def main(argv: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": run_command,
        "report": report_command,
        "compare": compare_command,
        "export": export_command,
        "list": list_command,
        "paper": paper_command,
        "reproduce": reproduce_command,
        "check-method": check_method_command,
        "parity": parity_command,
        "bench": bench_command,
        "data": data_command,
        "vbench": vbench_command,
        "doctor": doctor_command,
        "zoo": zoo_command,
    }
    if command in ("-h", "--help", "help"):
        print(HELP)
        return 0
    debug = "--debug" in rest or "debug=true" in rest
    try:
        if command == "--version":
            import ditbench

            print(f"ditbench {ditbench.__version__}")
            return 0
        if command not in commands:
            from ditbench.harness.common.errors import unknown_name

            raise unknown_name("command", command, commands)
        return commands[command](rest)
    except UserError as error:
        if debug:
            raise
        print(f"ditbench: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print(
            "ditbench: interrupted; finished runs are recorded, start the same command again to go on", file=sys.stderr
        )
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        if debug:
            raise
        print(f"ditbench: {of_the_system(error)}", file=sys.stderr)
        return EXIT_USER


def run_command(arguments: list[str]) -> int:
    """`ditbench run`: compose with Hydra, run every job, print the comparison."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(HELP)
        return 0
    from ditbench.harness.sweep import launch

    return launch(_flags_to_overrides(arguments))


def report_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ditbench report", description="Tables and plots of what was recorded.")
    parser.add_argument("--format", choices=["md", "csv", "latex", "html"], default="md")
    parser.add_argument("--experiment", help="one experiment; default: all")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="default: ./results")
    parser.add_argument("--out", type=Path, help="file to write; html default: <results-dir>/report[-EXPERIMENT].html")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="headline metrics, in this order")
    parser.add_argument("--over-seeds", action="store_true", help="one row for runs that differ in their seed only")
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of short errors")
    options = parser.parse_args(arguments)
    from ditbench.harness.report import report

    made = report(
        options.results_dir, options.experiment, options.format, options.out, options.metrics, options.over_seeds
    )
    print(made.text)
    if made.path is not None:
        print(made.path)
    return 0


def compare_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ditbench compare",
        description="Paired tests between methods of the same bits, and against the float model, sample by sample.",
    )
    parser.add_argument("experiment", nargs="?", help="default: all")
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="default: every metric with a value per sample")
    parser.add_argument("--bits", nargs="+", metavar="LABEL", help="only these, such as W4A8")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="default: ./results")
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of short errors")
    options = parser.parse_args(arguments)
    from ditbench.harness.report import comparisons

    print(comparisons(options.results_dir, options.experiment, options.metric, options.bits))
    return 0


def export_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ditbench export",
        description="A quantized transformer as safetensors, for plain diffusers (see docs/export.md).",
    )
    parser.add_argument(
        "wanted",
        nargs="+",
        metavar="RUN|EXPERIMENT|key=value",
        help="runs by id or folder, experiments by name; or a configuration, which is calibrated and quantized now",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make; several runs become its subfolders")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="default: ./results")
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of short errors")
    options = parser.parse_intermixed_args(arguments)
    from ditbench.harness.cli.main.export_runs import export

    for exported in export(options.wanted, options.out, options.results_dir):
        print(exported)
    return 0


def list_command(arguments: list[str]) -> int:
    from ditbench.harness.cli.main import listing

    parser = argparse.ArgumentParser(prog="ditbench list", description="What there is to choose from.")
    parser.add_argument("kind", choices=sorted(listing.KINDS))
    parser.add_argument("--debug", action="store_true")
    print(listing.KINDS[parser.parse_args(arguments).kind]())
    return 0


def paper_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ditbench paper", description="Numbers as papers report them.")
    parser.add_argument("action", choices=["list", "show"])
    parser.add_argument("name", nargs="?", help="of a table, to show: ptq4dit-table1")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)
    from ditbench.harness.papers import reported

    if options.action == "show" and options.name is None:
        raise UserError("paper show: which table? `ditbench paper list` names them")
    print(reported.listed() if options.action == "list" else reported.shown(options.name))
    return 0


def reproduce_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ditbench reproduce", description="A paper's table, run here and held against it."
    )
    parser.add_argument("name", help="of a table: ptq4dit-table1 (ditbench paper list)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, as in ditbench run")
    parser.add_argument(
        "--model", help="another model than the paper's, such as tiny-dit: n and steps as it usually has"
    )
    parser.add_argument("--plan", action="store_true", help="only say what it needs; nothing is loaded or run")
    options = parser.parse_intermixed_args(_flags_to_overrides(arguments))
    from ditbench.harness.papers.reported import reproduce

    if options.plan:
        print(reproduce.plan(options.name, options.model, options.overrides))
        return 0
    outcome = reproduce.reproduce(options.name, options.model, options.overrides)
    print(outcome.text)
    return EXIT_FAILED_RUNS if outcome.failed else 0


def check_method_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ditbench check-method", description="The conformance suite on one method.")
    parser.add_argument("name", help="a method's name, or all")
    parser.add_argument("--debug", action="store_true")
    from ditbench.harness.fitting.conformance import check_methods

    return check_methods(parser.parse_args(arguments).name)


def parity_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ditbench parity",
        description="Every real backend here against simulated execution, layer by layer and in images.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, as in ditbench run")
    parser.add_argument("--formats", nargs="+", default=[], metavar="BITS", help="w8a8 w4a8 …; default: all")
    options = parser.parse_intermixed_args(_flags_to_overrides(arguments))
    from ditbench.harness.cli.main.parity_check import check

    text, good = check(options.formats, options.overrides)
    print(text)
    return 0 if good else EXIT_FAILED_RUNS


def bench_command(arguments: list[str]) -> int:
    from ditbench.harness.bench import Options, bench, plot, shown
    from ditbench.harness.bench.others import OTHERS

    usual = Options()
    parser = argparse.ArgumentParser(
        prog="ditbench bench", description="Latency and memory of a denoising step against bf16, in one process."
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration: model=… method=…")
    parser.add_argument("--formats", nargs="+", default=usual.formats, metavar="BITS", help="w8a8 w4a8 …")
    parser.add_argument("--modes", nargs="+", default=usual.modes, choices=usual.modes)
    parser.add_argument("--batches", nargs="+", type=int, default=usual.batches, help="rows of one call")
    parser.add_argument(
        "--others", nargs="+", default=[], choices=list(OTHERS), help="other libraries' int8 beside ours"
    )
    parser.add_argument("--repeats", type=int, default=usual.repeats)
    options = parser.parse_intermixed_args(_flags_to_overrides(arguments))
    chosen = Options(
        *(tuple(getattr(options, name)) for name in ("formats", "modes", "batches", "others")), repeats=options.repeats
    )
    record, path = bench(chosen, options.overrides)
    plot(record, path.with_suffix(".html"))
    print(f"{shown(record)}\n{path}")
    return 0


def data_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ditbench data", description="What others publish: prompt sets, reference batches, judges' weights."
    )
    parser.add_argument("action", choices=["list", "fetch", "verify"])
    parser.add_argument("name", nargs="?", help="of an entry (ditbench data list); verify without one takes all")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)
    from ditbench.eval import data, fetch

    if options.action == "list":
        print(data.listed())
        return 0
    if options.action == "fetch":
        if options.name is None:
            raise UserError("data fetch: what? `ditbench data list` names what there is")
        print(fetch.fetch(data.find_data(options.name)))
        return 0
    text, good = data.verified([options.name] if options.name else data.known_data())
    print(text)
    return 0 if good else EXIT_USER


def vbench_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ditbench vbench", description="Official VBench, in an environment of its own, on recorded videos."
    )
    parser.add_argument("target", help="a run's folder, or an experiment")
    parser.add_argument("--dimension", nargs="+", metavar="NAME", help="default: those that the prompts are for")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="default: ./results")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)
    from ditbench.harness.scoring import official_vbench

    outcome = official_vbench.score(options.target, options.dimension, options.results_dir)
    print(outcome.text)
    return EXIT_FAILED_RUNS if outcome.failed else 0


def doctor_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ditbench doctor", description="What this machine can do.")
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    parser.add_argument("--debug", action="store_true")
    from ditbench.harness.cli.main.doctor import examine

    print(examine(parser.parse_args(arguments).results_dir))
    return 0


def zoo_command(arguments: list[str]) -> int:
    from ditbench.harness.zoo import trainable

    parser = argparse.ArgumentParser(prog="ditbench zoo", description="The embedded models.")
    parser.add_argument("action", choices=["train"])
    parser.add_argument("name", choices=sorted(trainable()))
    parser.add_argument("--out", type=Path, help="folder to write; default: where the shipped weights are")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path(".zoo-checkpoints"), help="an interrupted training resumes"
    )
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)
    folder, numbers = trainable()[options.name](options.out, options.checkpoints / options.name)
    for name, value in numbers.items():
        print(f"{name}: {value}")
    print(folder)
    return 0


def _flags_to_overrides(arguments: list[str]) -> list[str]:
    """--force, --strict and --debug are ours; everything else is Hydra's."""
    flags = {"--force": "force=true", "--strict": "strict=true", "--debug": "debug=true"}
    return [flags.get(argument, argument) for argument in arguments]


def entry() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes two lines per run to stderr
    sys.exit(main())


if __name__ == "__main__":
    entry()
