"""One run, told from top to bottom: config → calibrate → quantize → generate → evaluate → measure → record."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ditbench.eval.base import Evidence, PerSample, evaluate_samples, known_metrics, plugin_sources
from ditbench.eval.needs import lacking, offered
from ditbench.harness.build.build import build, clock_of
from ditbench.harness.calibration.recording import Calibration, calibrate
from ditbench.harness.common.code_identity import code_identity
from ditbench.harness.common.errors import UserError, reason
from ditbench.harness.common.files import canonical_sha256, disk_errors_explained, is_disk_error
from ditbench.harness.common.memory import PeakMemory, peak_memory
from ditbench.harness.fitting import mixed_precision, registry
from ditbench.harness.generation.float_model import float_images, float_values, noise_floor
from ditbench.harness.generation.generate import conditions, generate, save_animation, save_grid, save_samples
from ditbench.harness.measurement.latency import kind_of, measure
from ditbench.harness.measurement.layer_errors import ErrorAtlas, error_atlas, layer_table
from ditbench.harness.measurement.parity import layer_parity
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.models.macs import count_macs
from ditbench.harness.quant.accounting import account
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits, MixedBits
from ditbench.harness.quant.steps import step_ranges
from ditbench.harness.quant.target import Target
from ditbench.harness.records import record, sample_values, tracking
from ditbench.harness.records.environment import environment
from ditbench.harness.records.record import Record
from ditbench.harness.samples.samples import Samples
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.loaded import judge_in, left_alone, model_of, reference_of

PARITY_ROWS = 2


def run(config: RunConfig) -> Record:
    """Do one run and write its record; a run that is already recorded is not done again (unless config.force).

    A failure is recorded with its reason and returned, not raised; an interruption leaves no record.

    Raises:
        UserError: the model cannot be loaded, or results cannot be written; with config.strict: a metric would be skipped.
    """
    model = model_of(config.model)
    if config.strict and (skipped := will_be_skipped(config, model)):
        raise UserError(f"--strict: {config.model.name}: these metrics would be skipped\n{skipped}")
    run_id = canonical_sha256(identity(config, model))[:12]
    if not config.force and (done := record.finished(config.results_dir, config.name, run_id)):
        say(f"{title(config)}: already recorded in {done.folder}; --force runs it again")
        return done

    say(f"{title(config)}: run {run_id}")
    values = Record(run_id, "failed", config.raw, config.method, config.model.name, config.name)
    with (
        disk_errors_explained(config.results_dir),
        record.run_folder(config.results_dir, config.name, run_id) as folder,
    ):
        try:
            carry_out(config, model, values, folder)
            values.status = "ok"
        except Exception as error:
            if is_disk_error(error):
                raise  # the record could not be written either
            values.status, values.error = "failed", reason(error, registry.method(config.method).__file__)
            say(f"{title(config)}: FAILED: {values.error}")
            if config.raw["debug"]:
                traceback.print_exc()
        values.env = environment(config.device, config.seed) | {
            "weights_sha256": model.fingerprint,
            "method_sha256": registry.source_sha256(config.method),
        }
        values.env |= {"checkpoint_parts": model.parts} if model.parts else {}
        record.write(values, folder)
        track(config, values, folder)
    return record.attempts(config.results_dir, config.name, run_id)[-1]


def track(config: RunConfig, values: Record, folder: Path) -> None:
    """Tell the tracker of a written record; its failure is said and changes nothing."""
    try:
        tracking.log(config.section("tracker"), values, folder)
    except Exception as error:
        if is_disk_error(error):
            raise
        say(f"{title(config)}: recorded, but not tracked: {reason(error)}")


def carry_out(config: RunConfig, model: LoadedModel, values: Record, folder: Path) -> None:
    """Fill the record, stage by stage; what is filled stays if a later stage fails."""
    timer = Timer(values.timings_s)
    target = model.target(config.protocol.scope, config.protocol.skip, config.protocol.attention)
    with peak_memory(config.device) as memory:
        with timer("calibrate"):
            recording = stage_calibrate(config, model)
        target = target.without(recording.unreached)
        with timer("quantize"):
            if isinstance(config.bits, MixedBits):
                recipe, state, quantized, plan = stage_mixed(config, model, target, recording)
            else:
                recipe, state, quantized = stage_quantize(config, target, recording)
                plan = {}
    values.bits, size = stage_account(config, model, target, recipe)
    values.bits |= plan | unreached_layers(recording)
    with timer("generate"):
        images = stage_generate(config, model, quantized, state)
    with timer("reference"):
        float_model = float_images(config, model, seed=config.seed)
    with timer("evaluate"):
        values.metrics, found = stage_evaluate(config, model, images, float_model)
        of_float = float_values(
            config,
            model,
            {name: values.metrics[name] for name in found if not values.metrics[name]["paired"]},
            evaluate=lambda names: stage_evaluate(config, model, float_model, float_model, names)[1],
            evaluator=evaluator_identity(config, model),
        )
    with timer("noise_floor"):
        noise_floor(
            config,
            model,
            values.metrics,
            evaluate=lambda ours, theirs: stage_evaluate(config, model, ours, theirs)[0],
            evaluator=evaluator_identity(config, model),
        )
    with timer("measure"):
        values.efficiency = stage_measure(config, model, target, recipe, quantized) | size
    with timer("parity"):
        values.efficiency |= {"parity": stage_parity(target, recipe, quantized, recording)}
    with timer("layer_errors"):
        atlas = stage_layer_errors(config, target, recipe, quantized, recording)
        values.layers = layer_table(quantized, atlas)
    values.cost = fit_cost(values.timings_s, recording, memory)
    values.artifacts = save_artifacts(images, float_model, atlas, state, folder)
    sample_values.save(
        sample_values.Values(found, of_float, sample_values.drawn(images, config.seed)), folder / sample_values.FILE
    )
    values.artifacts["per_sample"] = sample_values.FILE


def unreached_layers(recording: Calibration) -> dict[str, list[str]]:
    """What the record's `bits` says of layers that nothing calls: they stay in float, whatever the protocol says."""
    return {"unreached_layers": list(recording.unreached)} if recording.unreached else {}


def fit_cost(timings_s: dict[str, float], recording: Calibration, memory: PeakMemory) -> dict[str, float | None]:
    """Seconds of calibration and quantization as if nothing had been cached (what the cache saved is added), and the
    most memory that was held meanwhile.
    """
    saved = sum(recording.saved_s.values())
    seconds = {"fit_s": timings_s["calibrate"] + timings_s["quantize"] + saved, "of_which_cached_s": saved}
    return seconds | {"peak_memory_bytes": memory.peak_bytes, "memory_before_bytes": memory.before_bytes}


def stage_calibrate(config: RunConfig, model: LoadedModel) -> Calibration:
    section = config.section("calibration")
    return calibrate(
        model,
        config.protocol.sampler,
        section["n"],
        config.seed,
        batch_size=section["batch_size"],
        cache=config.cache_dir,
        device=config.device,
        prompts=config.calibration_prompts,
    )


def stage_quantize(
    config: RunConfig, target: Target, recording: Calibration
) -> tuple[ModelRecipe, dict[str, Tensor], nn.Module]:
    recipe, state = fitted(config, target, recording, config.bits)
    return recipe, state, built(config, target, recipe)


def stage_mixed(
    config: RunConfig, model: LoadedModel, target: Target, recording: Calibration
) -> tuple[ModelRecipe, dict[str, Tensor], nn.Module, dict[str, Any]]:
    """As stage_quantize, with one of several formats for each layer; and what the record's `bits` says of the plan."""
    fit = partial(fitted, config, target, recording)
    recipe, state, plan = mixed_precision.quantize(config, config.bits, model, target, recording, fit)
    return recipe, state, built(config, target, recipe), plan


def fitted(
    config: RunConfig, target: Target, recording: Calibration, bits: Bits
) -> tuple[ModelRecipe, dict[str, Tensor]]:
    """A method may choose what it calibrates on; its layers are still judged on the whole recording."""
    method = registry.method(config.method)
    select = getattr(method, "select_calibration", None)
    calibration = recording if select is None else select(recording, config.params, config.seed)
    with left_alone(target.transformer, config.method), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        state = method.fit(target, calibration, bits, config.params)
        registry.check_state(config.method, state)
        recipe = method.apply(target, state, bits, config.params)
        registry.check_recipe(config.method, recipe, target)
    return recipe, state


def built(config: RunConfig, target: Target, recipe: ModelRecipe) -> nn.Module:
    dtype = getattr(torch, config.section("generate")["dtype"])
    return build(target, recipe, dtype=dtype, device=config.device, backend=config.backend)


def stage_account(config: RunConfig, model: LoadedModel, target: Target, recipe: ModelRecipe):
    macs = count_macs(model.transformer, model.step_inputs(1))
    return account(target, recipe, macs, config.bits.label)


def stage_generate(config: RunConfig, model: LoadedModel, quantized: nn.Module, state: dict[str, Tensor]) -> Samples:
    return generate(
        model,
        quantized,
        conditions(model, config.protocol.n, config.seed, config.protocol.labels, config.protocol.prompts),
        config.protocol.sampler,
        batch_size=config.section("generate")["batch_size"],
        correct=registry.correction(config.method, state, config.params),
        title=f"generate {title(config)}",
    )


def stage_evaluate(
    config: RunConfig, model: LoadedModel, images: Samples, float_model: Samples, names: Iterable[str] | None = None
) -> tuple[dict[str, Any], dict[str, PerSample]]:
    """The record's `metrics`, and the values per sample; names: of some of the run's metrics only."""
    evidence = evidence_of(config, model, images, float_model)
    entries, samples = evaluate_samples(config.section("metrics")["names"] if names is None else names, evidence)
    for name, entry in entries.items():
        if entry["status"] == "failed":
            say(f"{title(config)}: {name} FAILED: {entry['reason']}")
    return entries, samples


def evidence_of(config: RunConfig, model: LoadedModel, images: Samples, float_model: Samples | None) -> Evidence:
    section = config.section("metrics")
    return Evidence(
        generated=images,
        float_model=float_model,
        reference=reference_of(section["reference"]),
        judge=judge_in(model.extras.get("judge")),
        seed=config.seed,
        resamples=section["resamples"],
    )


def will_be_skipped(config: RunConfig, model: LoadedModel) -> str:
    """A line per metric that lacks something which can be known before the run; nothing is calibrated or generated."""
    wanted = conditions(model, 1, config.seed, config.protocol.labels, config.protocol.prompts)
    unseen = Samples(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), wanted.labels_N, prompts=config.protocol.prompts)
    has = offered(evidence_of(config, model, unseen, None))
    problems = {name: lacking(known_metrics()[name], has) for name in config.section("metrics")["names"]}
    return "\n".join(f"  {name}: {'; '.join(found)}" for name, found in problems.items() if found)


def stage_measure(
    config: RunConfig, model: LoadedModel, target: Target, recipe: ModelRecipe, quantized: nn.Module
) -> dict[str, Any]:
    section = config.section("measure")
    return measure(
        model,
        target,
        quantized,
        kind=kind_of(quantized, bool(recipe.attention)),
        samples=section["samples"],
        repeats=section["repeats"],
        warmup=section["warmup"],
        device=config.device,
        dtype=getattr(torch, config.section("generate")["dtype"]),
    )


def stage_parity(
    target: Target, recipe: ModelRecipe, quantized: nn.Module, calibration: Calibration
) -> dict[str, Any] | None:
    """The worst layer of the real kernels against simulated execution, on two recorded calls of each range of steps; None if
    all is simulated.
    """
    found = []
    for steps in step_ranges(recipe.starts, calibration.num_steps):
        step = steps[len(steps) // 2]
        clock_of(quantized).set(step, calibration.num_steps)
        call = partial(calibration.call, step=step, inputs=calibration.rows(step, PARITY_ROWS))
        found += layer_parity(target, recipe, quantized, call).items()
    if not found:
        return None
    name, worst = max(found, key=lambda each: each[1].relative)
    return {"layers": len({name for name, _ in found}), "worst_layer": name} | asdict(worst)


def stage_layer_errors(
    config: RunConfig, target: Target, recipe: ModelRecipe, quantized: nn.Module, calibration: Calibration
) -> ErrorAtlas | None:
    wanted = config.section("measure")["layer_errors"]
    return error_atlas(target, recipe, quantized, calibration) if wanted else None


def save_artifacts(
    images: Samples, float_model: Samples, atlas: ErrorAtlas | None, state: dict[str, Tensor], folder: Path
) -> dict[str, str]:
    save_samples(images, folder / "images.npz")
    save_grid(images, folder / "grid.png")
    save_grid(float_model, folder / "float_grid.png")
    saved = {"images": "images.npz", "grid": "grid.png", "float_grid": "float_grid.png"}
    if images.is_video:
        save_animation(images, folder / "animation.gif")
        save_animation(float_model, folder / "float_animation.gif")
        saved |= {"animation": "animation.gif", "float_animation": "float_animation.gif"}
    if state:
        # cloned: entries may be one tensor under several names, which safetensors refuses
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "state.safetensors")
        saved["state"] = "state.safetensors"
    if atlas is not None:
        atlas.save(folder / "layer_errors.npz")
        saved["layer_errors"] = "layer_errors.npz"
    return saved


def identity(config: RunConfig, model: LoadedModel) -> dict[str, Any]:
    """Everything that can change a number of this run."""
    return config.identity() | {
        "weights": model.fingerprint,
        "prompts": [asdict(p) for p in (*config.protocol.prompts, *config.calibration_prompts)],
        "evaluator": evaluator_identity(config, model),
        "device": str(config.device),
        "code": code_identity(),
        "method_source": registry.source_sha256(config.method),
    }


def evaluator_identity(config: RunConfig, model: LoadedModel) -> dict[str, Any]:
    judge = judge_in(model.extras.get("judge"))
    reference = reference_of(config.section("metrics")["reference"])
    return {
        "metrics": config.section("metrics"),
        "judge": judge and judge.sha256,
        "reference": reference and reference.sha256,
        "metric_plugins": plugin_sources(config.section("metrics")["names"]),
    }


def title(config: RunConfig) -> str:
    return f"{config.model.name} {config.method} {config.bits.label}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class Timer:
    """Wall time of each stage, into the record's timings_s."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = perf_counter() - start
