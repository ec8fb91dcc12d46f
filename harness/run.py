"""One run, told from top to bottom: config → calibrate → quantize → generate → evaluate → measure → record → report."""

from __future__ import annotations

import traceback

from ditbench.harness.common import watch
from ditbench.harness.common.errors import reason
from ditbench.harness.common.files import disk_errors_explained, is_disk_error
from ditbench.harness.common.memory import peak_memory
from ditbench.harness.common.precision import compute_float32_in_float32
from ditbench.harness.common.timer import Timer
from ditbench.harness.common.watch import say
from ditbench.harness.fitting import registry
from ditbench.harness.measurement.layer_errors import layer_table
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.records import attempts
from ditbench.harness.records.environment import environment, now
from ditbench.harness.records.record import Record, failed_metrics
from ditbench.harness.records.status import reported
from ditbench.harness.records.tracking import Tracked
from ditbench.harness.stages import external
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.evaluate import add_noise_floor, evaluate, refuse_skipped_metrics
from ditbench.harness.stages.generate import drawing_cost, float_samples, generate, save_artifacts
from ditbench.harness.stages.identity import run_id, title
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.measure import layer_errors, measure, parity
from ditbench.harness.stages.quantize import account, calibrate, fit_cost, quantize, target_of, unreached_layers


def run(config: RunConfig) -> Record:
    """Do one run and write its record; a run that is already recorded is not done again (unless config.force).

    A failure is recorded with its reason and returned, not raised; an interruption leaves no record.

    Raises:
        UserError: the model cannot be loaded, or results cannot be written; the tracker is not installed; with config.strict: a
            metric would be skipped.
    """
    compute_float32_in_float32()
    model = model_of(config.model)
    if config.strict:
        refuse_skipped_metrics(config, model)
    its_id = run_id(config, model)
    if not config.force and (done := attempts.finished(config.results_dir, config.name, its_id)):
        if not (failed := failed_metrics(done)):
            say(f"{title(config)}: already recorded in {done.folder}; --force runs it again")
            return done
        say(f"{title(config)}: {', '.join(failed)} failed in {done.folder}; again")

    if not watch.progress_is_shown():
        say(f"{title(config)}: run {its_id}")
    values = Record(its_id, "failed", config.raw, config.method, config.model.name, config.name)
    values.env = environment(config.device, config.seed) | {
        "weights_sha256": model.fingerprint,
        "method_sha256": registry.source_sha256(config.method),
    }
    values.env |= {"checkpoint_parts": model.parts} if model.parts else {}
    with (
        Tracked(config.section("tracker"), values, config.device) as tracked,
        watch.watching(tracked),
        disk_errors_explained(config.results_dir),
        attempts.attempt(config.results_dir, config.name, its_id) as attempt,
    ):
        watch.begins(its_id, title(config), attempt.folder)
        try:
            with reported(attempt.folder, its_id, title(config), values.env["device"]):
                (score_theirs if config.method == registry.EXTERNAL else carry_out)(config, model, values, attempt)
            values.status = "ok"
        except attempts.PublishedElsewhere as done:
            say(f"{title(config)}: {done}")
            tracked.recorded = done.record
            return done.record
        except Exception as error:
            if is_disk_error(error):
                raise  # the record could not be written either
            values.status, values.error = "failed", reason(error, registry.method(config.method).__file__)
            say(f"{title(config)}: FAILED: {values.error}")
            if config.raw["debug"]:
                traceback.print_exc()
        values.env["finished_at"] = now()
        tracked.recorded = recorded = attempt.publish(values, config.force)
    watch.ends(values.status, values.error)
    if not attempt.published:
        say(f"{title(config)}: {recorded.folder} is as good and stays; nothing was added")
    return recorded


def carry_out(config: RunConfig, model: LoadedModel, values: Record, attempt: attempts.Attempt) -> None:
    """Fill the record, stage by stage; what is filled stays if a later stage fails. All processes that do this run draw and
    score together; one of them measures.
    """
    timer, target = Timer(values.timings_s), target_of(config, model)
    with timer("reference"):
        float_model = float_samples(config, model, seed=config.seed)
    with peak_memory(config.device) as memory:
        with timer("calibrate"):
            recording = calibrate(config, model)
        target = target.without(recording.unreached)
        with timer("quantize"):
            quantized = quantize(config, model, target, recording)
    values.bits, size = account(config, model, target, quantized.recipe)
    values.bits |= quantized.plan | unreached_layers(recording)
    with timer("generate"):
        samples = generate(config, model, quantized, recording.key)
    values.made_from = {"recording": recording.key, "samples": samples.key, "float_samples": float_model.key}
    with timer("evaluate"):
        values.metrics, per_sample = evaluate(config, model, samples, float_model)
    with timer("noise_floor"):
        values.made_from["noise_samples"] = add_noise_floor(config, model, values.metrics)
    attempt.take_turn()
    with timer("measure"):
        values.efficiency = measure(config, model, target, quantized) | size
    with timer("parity"):
        values.efficiency |= {"parity": parity(target, quantized, recording)}
    with timer("layer_errors"):
        atlas = layer_errors(config, target, quantized, recording)
        values.layers = layer_table(quantized.model, atlas)
    values.cost = fit_cost(values.timings_s, recording, memory) | drawing_cost(quantized, recording, samples)
    values.artifacts = save_artifacts(samples, float_model, per_sample, atlas, quantized.state, attempt.folder)


def score_theirs(config: RunConfig, model: LoadedModel, values: Record, attempt: attempts.Attempt) -> None:
    """The same of a model that somebody else quantized: it is loaded where ours are calibrated and quantized, and it has no recipe
    that kernels or layers could be held against.
    """
    timer = Timer(values.timings_s)
    with timer("reference"):
        float_model = float_samples(config, model, seed=config.seed)
    with timer("load"):
        theirs = external.loaded(config, model)
    values.bits, size = external.account(config, model, theirs)
    with timer("generate"):
        samples = external.generate(config, model, theirs)
    values.made_from = {"samples": samples.key, "float_samples": float_model.key}
    with timer("evaluate"):
        values.metrics, per_sample = evaluate(config, model, samples, float_model)
    with timer("noise_floor"):
        values.made_from["noise_samples"] = add_noise_floor(config, model, values.metrics)
    attempt.take_turn()
    with timer("measure"):
        values.efficiency = external.measure(config, model, theirs) | size
    values.cost = external.cost(samples)
    values.artifacts = save_artifacts(samples, float_model, per_sample, None, {}, attempt.folder)
