"""Samples as older records had them: an images.npz beside the record."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ditbench.harness.samples.samples import Samples


def save_samples(samples: Samples, path: Path) -> None:
    np.savez_compressed(
        path,
        arr_0=samples.pixels[:].numpy(),
        arr_1=np.zeros(0) if samples.labels_N is None else samples.labels_N.numpy(),
        latents=np.zeros(0) if samples.latents is None else samples.latents[:].numpy(),
        prompts=np.array([json.dumps(asdict(prompt)) for prompt in samples.prompts], dtype=np.str_),
        fps=np.float64(samples.fps),
    )
