"""`ditbench parity`: every real backend that runs here, at every format it takes, held against simulated execution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ditbench.eval.batches import together
from ditbench.eval.fidelity import PSNR_HELD
from ditbench.harness.backends.base import known_backends
from ditbench.harness.backends.matrix import example_recipe
from ditbench.harness.build.build import build
from ditbench.harness.cli.flags import Parser, flags_to_overrides, without_overrides
from ditbench.harness.common.errors import EXIT_FAILED_RUNS, UserError
from ditbench.harness.common.text_table import table
from ditbench.harness.fitting.registry import formats_of
from ditbench.harness.measurement.parity import (
    E4M3_IMAGE_LIMIT_DB,
    IMAGE_LIMIT_DB,
    LAYER_LIMIT,
    layer_limit,
    layer_parity,
)
from ditbench.harness.models.calls import float_dtype
from ditbench.harness.quant.spec import FP8
from ditbench.harness.samples.samples import Rows
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.generate import few
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.quantize import calibrate, quantize, target_of
from ditbench.harness.sweep.compose import composed

IMAGES = 4
ROWS = 2  # of the recorded calls of the middle step


@dataclass(frozen=True)
class Row:
    """psnr_db: the least of the images; inf where they are the same."""

    format: str
    backend: str
    layers: int
    relative: float
    largest: float
    psnr_db: float

    @property
    def keeps_limits(self) -> bool:
        images_db = E4M3_IMAGE_LIMIT_DB if self.format == FP8.upper() else IMAGE_LIMIT_DB
        return self.relative <= layer_limit(self.backend) and self.psnr_db >= images_db


def check(formats: Iterable[str], overrides: Sequence[str]) -> tuple[str, bool]:
    """→ (table, whether every row keeps the limits).

    Raises:
        UserError: a value that cannot be used, or no real backend on this machine runs any of the formats.
    """
    usual = [f"protocol.n={IMAGES}", *overrides, "backend=simulate"]
    wanted = [label.lower() for label in formats or formats_of(composed([usual])[0]["method"]["name"])]
    rows = [row for raw in composed([*usual, f"bits={label}"] for label in wanted) for row in rows_of(parse(raw))]
    if not rows:
        raise UserError(f"no real backend here runs {', '.join(wanted)} (ditbench list backends)")
    shown = table(
        ("format", "backend", "layers", "worst ‖Δ‖/‖y‖", "worst max|Δ|/max|y|", "images, worst PSNR", "verdict"),
        [
            (
                *(row.format, row.backend, str(row.layers), f"{row.relative:.1e}", f"{row.largest:.1e}"),
                "identical" if row.psnr_db == float("inf") else f"{row.psnr_db:.1f} dB",
                "agrees" if row.keeps_limits else "DIFFERS",
            )
            for row in rows
        ],
    )
    images = f"{IMAGE_LIMIT_DB:g} dB ({E4M3_IMAGE_LIMIT_DB:g} in FP8)"
    own = [(each, layer_limit(each)) for each in dict.fromkeys(row.backend for row in rows)]
    of_some = "".join(f" ({limit:.2g} of {name})" for name, limit in own if limit != LAYER_LIMIT)
    limits = f"real kernels against simulated execution; limits: {LAYER_LIMIT:g} per layer{of_some}, {images}"
    return f"{shown}\n{limits}", all(row.keeps_limits for row in rows)


def rows_of(config: RunConfig) -> list[Row]:
    """One row for each real backend that runs this format here."""
    able = [
        backend
        for backend in known_backends().values()
        if backend.KIND == "measured" and backend.unsupported(example_recipe(config.bits.label), config.device) is None
    ]
    if not able:
        return []
    model = model_of(config.model)
    recording = calibrate(config, model)
    target = target_of(config, model).without(recording.unreached)
    simulated = quantize(config, model, target, recording)
    expected = few(config, model, simulated).pixels
    step, rows = recording.num_steps // 2, []
    for backend in able:
        integer = build(
            target, simulated.recipe, dtype=float_dtype(simulated.model), device=config.device, backend=backend.NAME
        )
        layers = layer_parity(
            target, simulated.recipe, integer, lambda m: recording.call(m, step, recording.rows(step, ROWS))
        )
        relative, largest = (max(getattr(each, name) for each in layers.values()) for name in ("relative", "largest"))
        worst_db = worst_psnr_db(few(config, model, replace(simulated, model=integer)).pixels, expected)
        rows.append(Row(config.bits.label, backend.NAME, len(layers), relative, largest, worst_db))
    return rows


def worst_psnr_db(pixels: Rows, expected: Rows) -> float:
    """The least PSNR of uint8 samples (N, …) against others; infinite where all are the same."""
    at_once = together(pixels, PSNR_HELD)
    pairs = zip(pixels.split(at_once), expected.split(at_once), strict=True)
    errors = [(ours.double() - theirs.double()).square().flatten(1).mean(1) for ours, theirs in pairs]
    return float(-10 * torch.log10(torch.cat(errors).max() / 255**2))


def command(arguments: list[str]) -> int:
    parser = Parser(
        prog="ditbench parity",
        description="Every real backend here against simulated execution, layer by layer and in images.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, as in ditbench run")
    parser.add_argument("--formats", nargs="+", default=[], metavar="BITS", help="w8a8 w4a8 …; default: all")
    options = parser.parse_intermixed_args(flags_to_overrides(arguments))

    text, good = check(without_overrides(options.formats, options.overrides), options.overrides)
    print(text)
    return 0 if good else EXIT_FAILED_RUNS
