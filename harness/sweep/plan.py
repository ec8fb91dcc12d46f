"""`ditbench run … --plan`: what one run or a sweep would take, before anything is loaded, drawn or written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

from omegaconf import DictConfig

from ditbench.harness.build.offload import OFFLOAD, RESIDENT
from ditbench.harness.common.devices import CPU, device_name
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.memory import free_memory
from ditbench.harness.common.precision import compute_float32_in_float32
from ditbench.harness.common.text_table import table
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.counts import Counts, counted
from ditbench.harness.models.skeleton import skeleton
from ditbench.harness.models.transformer_only import TransformerOnly
from ditbench.harness.records import attempts
from ditbench.harness.records.record import Record
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.evaluate import refuse_skipped_metrics
from ditbench.harness.stages.identity import run_id, title
from ditbench.harness.sweep.compose import resolved
from ditbench.harness.sweep.estimate import Estimate, RunPlan, Stage, batch_size
from ditbench.harness.sweep.jobs import without_hydra
from ditbench.harness.sweep.launch import checked, through_hydra
from ditbench.harness.sweep.multirun import multirun
from ditbench.harness.sweep.overrides import BASIC, SWEEPER
from ditbench.harness.sweep.rates import Earlier, Rates, earlier, probed, readable

WIDTH = 118
NOBODY_ELSE = 0.9  # of free memory that a run may take


def plan(arguments: list[str]) -> str:
    """The plan of what `ditbench run` with these arguments would do, as text; nothing is written but hashes of large files.

    Raises:
        UserError: a choice, override or value that cannot be used; no run can be planned.
    """
    compute_float32_in_float32()
    configs, refused = configurations(arguments)
    if not configs:
        raise refused[0]
    planner = Planner()
    plans = []
    for config in configs:
        try:
            plans.append((config, planner.planned(config)))
        except UserError as error:
            refused.append(error)
    if not plans:
        raise refused[0]
    lines = [
        f"plan of {len(plans)} run{'s' * (len(plans) > 1)} on {device_name(configs[0].device)}; nothing is run or recorded"
    ]
    for _, each in plans:
        lines += ["", *described(each)]
    ends = [*summed([each for _, each in plans]), *problems(plans, planner)]
    ends += [f"left out: {error}" for error in dict.fromkeys(map(str, refused))]
    lines += ["", *ends] if ends else []
    return "\n".join(part for line in lines for part in (wrap(line, WIDTH, subsequent_indent="  ") or [""]))


def configurations(arguments: list[str]) -> tuple[list[RunConfig], list[UserError]]:
    """The runs that `ditbench run` would do with these arguments, in its order, and why others would be refused."""
    found: list[RunConfig] = []
    refused: list[UserError] = []

    def job(config: DictConfig) -> str:
        try:
            found.append(parse(resolved(config)))
        except UserError as error:
            refused.append(error)
        return "planned"

    for each in arguments:
        if each.startswith(f"{SWEEPER}="):
            _refuse_seeker(each.partition("=")[2])
    here = checked([argument for argument in arguments if not argument.startswith("hydra/launcher=")])
    with multirun(here) as sweep:
        if sweep is not None:
            _refuse_seeker(sweep.config.hydra.runtime.choices.get(SWEEPER, BASIC))  # an experiment's file may name one
            for number, overrides in enumerate(sweep.jobs()):
                job(without_hydra(sweep.composed(number, overrides)))
            return found, refused
    with tempfile.TemporaryDirectory() as folder:  # where Hydra leaves its own note of a sweep
        through_hydra([*here, f"hydra.sweep.dir={folder}"], job)
    return found, refused


def _refuse_seeker(sweeper: str) -> None:
    if sweeper != BASIC:
        raise UserError(
            f"--plan: {SWEEPER}={sweeper} chooses each run by what the ones before gave, so nobody knows them before; plan one of "
            "them, or leave the sweeper out and name values (-m method.strength=0.4,0.6)"
        )


class Planner:
    """Plans the runs of a sweep one after the other; what they share is counted, probed and made once."""

    def __init__(self) -> None:
        self.base_bytes = _held_bytes()
        self.made: set[Path] = set()
        self._models: dict[str, LoadedModel] = {}
        self._counts: dict[str, Counts] = {}
        self._rates: dict[str, Rates] = {}
        self._records: dict[Path, list[Record]] = {}
        self.estimates: dict[str, Estimate] = {}  # by run id

    def planned(self, config: RunConfig) -> RunPlan:
        model = _once(self._models, repr(config.model), lambda: skeleton(config.model))
        if config.strict:
            refuse_skipped_metrics(config, model)
        sampler = config.protocol.sampler
        key = repr((config.model, sampler.kind, sampler.guidance))
        counts = _once(self._counts, key, lambda: counted(model, sampler))
        section = config.section("generate")
        key = repr((key, config.bits, config.device, config.backend, section, config.raw["protocol"]["n"]))
        rates = _once(self._rates, key, lambda: probed(config, model, counts))
        known = _once(
            self._records, config.results_dir, lambda: readable(lambda: attempts.read_all(config.results_dir))
        )
        before = earlier(config, known)
        done = attempts.finished(config.results_dir, config.name, its_id := run_id(config, model))
        found = RunPlan(
            title(config), its_id, done.folder if done and not config.force else None, source=_source(rates, before)
        )
        found.unknown = list(counts.unknown)
        if isinstance(model.pipe, TransformerOnly):
            found.unknown.append(
                "samples: random weights alone draw nothing, this is what a whole model of that size would take"
            )
        if found.recorded is None:
            estimate = Estimate(config, model, counts, rates, before, self.base_bytes, config.device.type != "cpu")
            for memory in (RESIDENT, OFFLOAD):
                on_it = replace(estimate, config=replace(config, memory=memory), accelerated=True)
                there = RunPlan("", "", None, on_it.stages(set(self.made)))
                found.accelerated[memory] = there.most(lambda s: s.host_bytes), there.most(lambda s: s.device_bytes)
            found.stages = estimate.stages(self.made)
            self.estimates[its_id] = estimate
        return found


def _once(known: dict, key: object, make: Callable):
    if key not in known:
        known[key] = make()
    return known[key]


def _source(rates: Rates, before: Earlier) -> str:
    floats = ", ".join(f"{dtype} {amount(speed)}MAC/s" for dtype, speed in rates.float_macs_s.items())
    rounded = f"{'kernel' if rates.real else 'simulated'} {amount(rates.quantized_macs_s)}MAC/s"
    records = "; stages that earlier records of this model on this device have: theirs" if before.seconds else ""
    return f"{rates.source}: {floats}, rounded ({rounded}){records}"


def described(plan: RunPlan) -> list[str]:
    """A run's table."""
    head = f"{plan.title} · run {plan.run_id}"
    if plan.recorded is not None:
        return [f"{head}: already recorded in {plan.recorded}; --force runs it again"]
    rows = [_row(stage) for stage in plan.stages]
    header = ("stage", "state", "operations", "time", "host", "device", "disk")
    lines = [head, *table(header, rows).splitlines()]
    lines.append(f"in all: {_in_all([plan])}")
    if not plan.most(lambda s: s.device_bytes):
        ways = (
            f"host {size(host)}, device {size(device)} (memory={way})"
            for way, (host, device) in plan.accelerated.items()
        )
        lines.append(f"on an accelerator: {' or '.join(ways)}")
    lines.append(f"rates: {plan.source}")
    return lines + [f"not counted: {each}" for each in plan.unknown]


def _row(stage: Stage) -> tuple[str, ...]:
    more = "≥ " if stage.at_least else ""
    seconds = "?" if stage.seconds is None else f"{more}{duration(stage.seconds)}"
    macs = f"{amount(stage.macs)}MAC" if stage.macs else "–"
    sizes = (stage.host_bytes, stage.device_bytes, stage.disk_bytes)
    return stage.name, stage.state or "to do", macs, seconds, *(size(each) for each in sizes)


def summed(plans: list[RunPlan]) -> list[str]:
    todo = [plan for plan in plans if plan.recorded is None]
    if len(plans) == 1:
        return []
    return [f"the sweep: {len(todo)} of {len(plans)} runs to do, {_in_all(todo)}"]


def _in_all(plans: list[RunPlan]) -> str:
    stages = [stage for plan in plans for stage in plan.stages]
    more = any(stage.at_least or stage.seconds is None for stage in stages)
    whole = RunPlan("", "", None, stages)
    names = sorted({stage.name for stage in stages if stage.seconds is None or stage.at_least})
    rest = f" ({' and '.join(names)} not wholly known)" if more else ""
    return (
        f"{amount(whole.total(lambda s: s.macs))}MAC, {'≥ ' * more}{duration(whole.total(lambda s: s.seconds))}{rest}, "
        f"host {size(whole.most(lambda s: s.host_bytes))}, device {size(whole.most(lambda s: s.device_bytes))}, "
        f"disk {size(whole.total(lambda s: s.disk_bytes))}"
    )


def problems(plans: list[tuple[RunConfig, RunPlan]], planner: Planner) -> list[str]:
    """What would not fit here, and which setting mends it."""
    found: list[str] = []
    disk = sum(plan.total(lambda s: s.disk_bytes) for _, plan in plans)
    config = plans[0][0]
    if disk > (free := _free_disk(config.cache_dir)):
        found.append(
            f"disk: {size(disk)} of {size(free)} free; protocol.n, generate.noise_floor_seeds, or cache_dir=… elsewhere"
        )
    for config, plan in plans:
        for what, of, here in (
            ("host memory", lambda stage: stage.host_bytes, free_memory(CPU)),
            (
                "device memory",
                lambda stage: stage.device_bytes,
                None if config.device == CPU else free_memory(config.device),
            ),
        ):
            if here is None or not plan.stages:
                continue
            worst = max(plan.stages, key=of)
            if of(worst) > NOBODY_ELSE * here:
                mend = _mend(planner.estimates[plan.run_id], of, NOBODY_ELSE * here)
                found.append(f"{what} ({plan.title}, {worst.name}): {size(of(worst))} of {size(here)} free; {mend}")
    return [f"does not fit: {each}" for each in dict.fromkeys(found)]


def _mend(estimate: Estimate, of: Callable[[Stage], float], room: float) -> str:
    """The largest batch that fits, or what else there is to do."""
    config = estimate.config
    batch = batch_size(config, estimate.counts, "generate", config.protocol.n)
    while batch > 1:
        batch //= 2
        smaller = {"generate": {"batch_size": batch}, "calibration": {"batch_size": batch}}
        raw = config.raw | {name: config.section(name) | values for name, values in smaller.items()}
        stages = replace(estimate, config=replace(config, raw=raw)).stages(set())
        if max(map(of, stages)) <= room:
            return f"generate.batch_size={batch} calibration.batch_size={batch}"
    section = config.section("generate")
    mends = ["memory=offload"] if "memory" in config.raw and estimate.accelerated else []
    if "float32" in (section["dtype"], section["reference_dtype"], config.model.dtype):
        mends.append("model.dtype, generate.dtype and generate.reference_dtype bfloat16")
    if config.section("measure")["layer_errors"]:
        mends.append("measure.layer_errors=false (a float32 copy of the transformer)")
    return f"not in batches of 1 either: {', '.join([*mends, 'a machine with more'])}"


def _held_bytes() -> float:
    """Of this process, which has imported what a run imports."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0.0
    return pages * 4096.0


def _free_disk(folder: Path) -> float:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return float(shutil.disk_usage(folder).free)


def amount(value: float) -> str:
    """12.3 T, with the unit to follow."""
    for step in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5:
            return f"{value:.3g} {step}"
        value /= 1000
    return f"{value:.3g} Z"


def size(value: float) -> str:
    if value < 1000:
        return "–" if not value else f"{value:.0f} B"
    return f"{amount(value)}B"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 60:
        return f"{minutes:.3g} min"
    return f"{hours:.3g} h" if hours < 48 else f"{days:,.0f} days"
