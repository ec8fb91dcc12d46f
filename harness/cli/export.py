"""`ditbench export`: recorded runs, or a configuration, as folders that plain diffusers can load."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ditbench.harness.build.export import save_quantized
from ditbench.harness.build.openvino_export import save_openvino, why_not_activations
from ditbench.harness.build.openvino_run import WEIGHTS
from ditbench.harness.cli.flags import Parser, folder
from ditbench.harness.common.artifacts import Damaged
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.extras import needed
from ditbench.harness.common.tensor_files import load_hashed
from ditbench.harness.fitting import mixed_precision, registry
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.schedule import schedule_of
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits, MixedBits
from ditbench.harness.quant.target import Target
from ditbench.harness.records import record
from ditbench.harness.records.attempts import is_experiment, read_all
from ditbench.harness.records.record import Record
from ditbench.harness.records.tracking import keep
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.quantize import account, calibrate, planned, target_of, unreached_layers
from ditbench.harness.stages.states import with_attention_given
from ditbench.harness.sweep.compose import composed


@dataclass(frozen=True)
class Exported:
    """One folder that was written. bytes: of its tensors; notes: what it does not hold; run: the record that it was made of."""

    folder: Path
    title: str
    bytes: int
    compression: float
    notes: tuple[str, ...]
    run: Record | None = None

    def __str__(self) -> str:
        smaller = self.compression >= 1  # floats of 32 bits beside the codes may take more than they save
        size = f"{self.compression:.2f}× smaller" if smaller else f"{1 / self.compression:.2f}× larger"
        lines = [f"{self.folder}: {self.title}, {self.bytes:,} bytes, {size} than in 16 bits"]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


DIFFUSERS, OPENVINO, OPENVINO_WEIGHTS = "diffusers", "openvino", "openvino-weights"
FORMATS = (DIFFUSERS, OPENVINO, OPENVINO_WEIGHTS)


def export(wanted: list[str], out: Path, results_dir: Path, form: str = DIFFUSERS) -> list[Exported]:
    """What is asked for, written.

    form: one of FORMATS.

    wanted: names of runs (a run id, or a run's folder) and experiments; or overrides such as method=rtn bits=w4a8. One run
    or configuration becomes `out` itself; experiments and several runs become its subfolders.

    Raises:
        UserError: nothing of that name, a run that did not end well, or one that the weights and methods here do not fit.
    """
    overrides = [each for each in wanted if "=" in each]
    if overrides and len(overrides) < len(wanted):
        raise UserError(f"export: either runs or overrides, got both: {' '.join(wanted)}")
    if overrides:
        return [export_config(parse(composed([overrides])[0]), out, form)]
    found = [_named(name, results_dir) for name in wanted]
    if len(found) == 1 and isinstance(found[0], Record):
        return [export_run(found[0], out, form)]
    runs = [run for each in found for run in ([each] if isinstance(each, Record) else each)]
    return [export_run(run, out / folder_name(run), form) for run in runs]


def check_place(out: Path, form: str) -> None:
    """Raise UserError, before hours of calibration, for what would be refused after them."""
    if out.exists():
        raise UserError(f"{out} exists; an export overwrites nothing, choose another --out")
    try:
        existing = next(each for each in out.absolute().parents if each.exists())
        with TemporaryDirectory(dir=existing, prefix=".export-"):
            pass
    except OSError as error:
        raise UserError(f"export: {out} cannot be made ({error.strerror or error}); choose another --out") from error
    if form != DIFFUSERS:
        needed("openvino", "openvino", f"export --format {form}")


def _check_form(config: RunConfig, form: str) -> None:
    """Raise UserError, before hours of calibration, for activations that the format has no form for, whatever the method finds."""
    if form != OPENVINO or isinstance(config.bits, MixedBits) or config.bits.act is None:
        return
    if why := why_not_activations(config.bits.act):
        raise UserError(f"export --format openvino: OpenVINO has no form for bits={config.bits.label.lower()}: {why}")


def export_config(config: RunConfig, out: Path, form: str = DIFFUSERS) -> Exported:
    """Calibrate, quantize, write; nothing is drawn or recorded."""
    check_place(out, form)
    _check_form(config, form)
    model, target = _model_and_target(config)
    recording = calibrate(config, model)
    target = target.without(recording.unreached)
    recipe, _, plan = planned(config, model, target, recording)
    return _written(config, model, target, recipe, out, form, run_id=None, plan=plan | unreached_layers(recording))


def export_run(run: Record, out: Path, form: str = DIFFUSERS) -> Exported:
    """Write what a recorded run had quantized, from the state that it saved."""
    check_place(out, form)
    where = f"run {run.run_id} ({run.method}, {run.model})"
    with _of_a_record(run):
        _check_fields(run)
        config = parse(run.config | {"device": "cpu"})  # nothing is run, wherever the run was
    model, target = _model_and_target(config)
    if run.env.get("weights_sha256") != model.fingerprint:
        raise UserError(f"{where}: its model's weights are not those of model={config.model.name} here; run it again")
    if run.env.get("method_sha256") != registry.source_sha256(config.method):
        raise UserError(f"{where}: method {config.method} was edited since; run it again")
    with _of_a_record(run):
        target = target.without(run.bits.get("unreached_layers", ()))
        recipe = with_attention_given(target, recipe_of(config, target, state_of(run), run.bits.get("mixed")))
    plan = {key: run.bits[key] for key in ("label", "mixed") if "mixed" in run.bits}
    plan |= {key: run.bits[key] for key in ("unreached_layers",) if key in run.bits}
    return replace(_written(config, model, target, recipe, out, form, run_id=run.run_id, plan=plan), run=run)


def state_of(run: Record) -> dict[str, Tensor]:
    """What the method learned, as the run saved it.

    Raises:
        UserError: the file is damaged, or the record names one outside its folder.
    """
    name = run.artifacts.get("state")
    if name is None:
        return {}
    assert run.folder is not None
    if Path(name).name != name:
        raise UserError(
            f"{run.folder}: its record names the state {name!r}, which is no file of that folder; run it again"
        )
    try:
        return load_hashed(run.folder / name)
    except Damaged as damage:
        raise UserError(
            f"{damage}; what the method learned cannot be told from it, run it again with --force"
        ) from damage


def recipe_of(config: RunConfig, target: Target, state: dict[str, Tensor], plan: dict[str, Any] | None) -> ModelRecipe:
    """What the method makes of a state that was saved, by the plan of mixed precision if there is one."""

    def apply(bits: Bits, own: dict[str, Tensor]) -> ModelRecipe:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return registry.method(config.method).apply(target, own, bits, config.params)

    if not isinstance(config.bits, MixedBits):
        return apply(config.bits, state)
    assert plan is not None, "a record of bits=mixed holds its plan"
    candidates = {bits.label.lower(): bits for bits in config.bits.candidates}
    return mixed_precision.of_state(target, plan, state, lambda label, own: apply(candidates[label], own))


def _written(
    config: RunConfig,
    model: LoadedModel,
    target: Target,
    recipe: ModelRecipe,
    out: Path,
    form: str,
    *,
    run_id: str | None,
    plan: dict[str, Any],
) -> Exported:
    bits, size = account(config, model, target, recipe)
    bits |= plan
    notes = []
    if registry.correction(config.method, {}, config.params) is not None:
        notes.append(f"{config.method} also corrects the sampler's steps; that part is not in an export")
    about: dict[str, Any] = {
        "run_id": run_id,
        "method": config.method,
        "params": asdict(config.params),
        "bits": bits,
        "size": size,
        "model": asdict(config.model),
        "weights_sha256": model.fingerprint,
        "notes": notes,
        "sampler": asdict(config.protocol.sampler),
    }
    title = f"{config.model.name} {config.method} {bits['label']}"
    if form != DIFFUSERS:
        weights_only = form == OPENVINO_WEIGHTS
        examples = model.step_inputs(2), model.step_inputs(3)
        described = save_openvino(out, target, recipe, examples, about=about, weights_only=weights_only)
        stored = described["files"][WEIGHTS]["bytes"]
        error = f"{described['error_to_simulate']:.1e}"
        notes += [
            "what is not quantized is kept in float32",
            f"in float32 OpenVINO is {error} from simulate (relative)",
        ]
        if weights_only and any(layer.act for layer in recipe.layers.values()):
            notes.append("activations are float: what the record says of rounded ones does not hold")
        return Exported(out, f"{title}, {form}", stored, size["baseline_model_bytes"] / stored, tuple(notes))
    schedule = None if recipe.num_steps is None else schedule_of(model, config.protocol.sampler)
    dtype = getattr(torch, config.section("generate")["dtype"])
    described = save_quantized(out, target, recipe, dtype=dtype, about=about, schedule=schedule)
    stored = described["tensors"]["bytes"]
    return Exported(out, title, stored, size["baseline_model_bytes"] / stored, tuple(notes))


def _model_and_target(config: RunConfig) -> tuple[LoadedModel, Target]:
    if config.method == registry.FLOAT:
        raise UserError("export: method fp quantizes nothing; save the pipeline itself (pipe.save_pretrained)")
    if config.method == registry.EXTERNAL:
        raise UserError(
            "export: method external is somebody else's checkpoint: it has no recipe, and is a file already"
        )
    model = model_of(config.model)
    return model, target_of(config, model)


def _named(name: str, results_dir: Path) -> Record | list[Record]:
    """A run, by its folder or its id, or the runs of an experiment that ended well."""
    if (Path(name) / "record.json").exists():
        return _ok(record.read(Path(name) / "record.json"))
    runs = sorted((results_dir / "runs").glob(f"*/{glob.escape(name)}/record.json"))
    if runs:
        return _ok(record.read(runs[0]))
    if is_experiment(results_dir, name):
        kept = [r for r in read_all(results_dir, name) if r.status == "ok" and r.method != registry.FLOAT]
        if kept:
            return kept
        raise UserError(f"experiment {name!r} has no run that ended well and quantized something")
    raise UserError(
        f"export: no run and no experiment {name!r} under {results_dir / 'runs'}; `ditbench report` lists them"
    )


def _ok(run: Record) -> Record:
    if run.status != "ok":
        raise UserError(f"run {run.run_id} is {run.status}: {run.error}; there is nothing to export")
    return run


def folder_name(run: Record) -> str:
    """The run's subfolder of --out: one name, whatever its record says."""
    parts = (run.model, run.method, str(run.bits.get("label")).lower(), run.run_id)
    return "-".join(re.sub(r"[^\w.+-]+", "_", str(part))[:60].lstrip(".-") or "_" for part in parts)


def _check_fields(run: Record) -> None:
    """What is read of a record has the types that it is read as; more is not asked."""
    of = {"config": run.config, "bits": run.bits, "env": run.env, "artifacts": run.artifacts}
    for name, value in of.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is a {type(value).__name__}, not a section")
    if not all(isinstance(each, str) for each in (*run.artifacts.values(), run.bits.get("label"))):
        raise ValueError("bits.label, and every file among its artifacts, is a text")


@contextmanager
def _of_a_record(run: Record) -> Iterator[None]:
    """Whatever a record says that no run can have said is one line."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        line = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{run.folder}: its record or state cannot be used ({type(error).__name__}: {line}); run it again"
        ) from error


def command(arguments: list[str]) -> int:
    parser = Parser(
        prog="ditbench export",
        description="A quantized transformer as safetensors for plain diffusers, or as an OpenVINO model (see docs/export.md).",
    )
    parser.add_argument(
        "wanted",
        nargs="+",
        metavar="RUN|EXPERIMENT|key=value",
        help="runs by id or folder, experiments by name; or a configuration, which is calibrated and quantized now",
    )
    parser.add_argument("--out", type=folder, required=True, help="folder to make; several runs become its subfolders")
    parser.add_argument("--results-dir", type=folder, default=Path("results"), help="default: ./results")
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of short errors")
    parser.add_argument(
        "--track", action="store_true", help="also keep it as an artifact of the run in the run's tracker"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=DIFFUSERS,
        help="of the folder: for plain diffusers (default); for OpenVINO's CPU, whole or weights alone",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.track and any("=" in each for each in options.wanted):
        raise UserError("export --track: a configuration has no run in a tracker; name a run or an experiment")

    for exported in export(options.wanted, options.out, options.results_dir, options.format):
        print(exported)
        if options.track and exported.run is not None:
            keep(exported.run, exported.folder, folder_name(exported.run), "quantized-model")
    return 0
