"""Every metric gives the same of samples in memory and of samples in a store, reads a bounded number of bytes at once, and
makes no number of latents that are not finite."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from every_metric import EVERY, evidence_for, image_evidence, video_evidence
from every_metric import every_network as every_network  # fixtures
from every_metric import network_files as network_files
from torch import Tensor

from ditbench.eval import batches, libraries
from ditbench.eval.base import Evidence, evaluate_samples, known_metrics
from ditbench.eval.features import against_float
from ditbench.eval.reference import images_sha256
from ditbench.harness.common.artifacts import Address
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.samples.samples import Prompt, Samples
from ditbench.harness.samples.store import StoredRows, open_store

PIECE = 4  # of 6 samples: the last piece is smaller
BOTH_KINDS = ("collapse", "lpips_alex", "psnr", "sqnr", "ssim")  # of images and of videos
CASES = [(name, evidence_for(name).generated.is_video) for name in EVERY] + [(name, True) for name in BOTH_KINDS]


def given(name: str, video: bool) -> Evidence:
    return video_evidence() if video and name in BOTH_KINDS else evidence_for(name)


def in_a_store(samples: Samples, folder: Path) -> Samples:
    n = len(samples)
    prompts = samples.prompts or (Prompt(""),) * n
    wanted = Conditions(tuple(range(n)), samples.labels_N, prompts)
    store = open_store(Address(folder, "samples", "0123456789abcdef", "samples"), wanted, lambda: PIECE, latents=True)
    for piece in store.pieces:
        rows = slice(piece.rows.start, piece.rows.stop)
        store.publish(piece, samples.pixels[rows], samples.latents[rows], samples.fps)
    return replace(store.samples(), prompts=samples.prompts)


class Watched:
    """Rows of a tensor, and how many bytes were asked for at once and are alive at once."""

    def __init__(self, rows: Tensor, limit_bytes: int) -> None:
        self.rows, self.limit_bytes, self.read_bytes, self.largest_alive = rows, limit_bytes, 0, 0
        self.shape, self.dtype, self.ndim = rows.shape, rows.dtype, rows.ndim
        self._alive: dict[int, tuple[weakref.ref, int]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def split(self, size: int) -> Iterator[Tensor]:
        return (self[start : start + size] for start in range(0, len(self), size))

    def __getitem__(self, wanted: int | slice | Sequence[int] | Tensor) -> Tensor:
        found = self.rows[wanted].clone()
        if found.nbytes > max(self.limit_bytes, self.rows[0].nbytes):
            raise AssertionError(f"{found.nbytes} bytes asked for at once, {self.limit_bytes} were to be")
        self.read_bytes += found.nbytes
        self._alive = {key: held for key, held in self._alive.items() if held[0]() is not None}
        self._alive[id(found)] = weakref.ref(found), found.nbytes
        self.largest_alive = max(self.largest_alive, sum(size for _, size in self._alive.values()))
        return found


def rewrapped(evidence: Evidence, rows_of) -> Evidence:
    """The same evidence with other Rows around pixels, latents and the reference."""

    def of(samples: Samples | None) -> Samples | None:
        return samples and replace(samples, pixels=rows_of(samples.pixels), latents=rows_of(samples.latents))

    reference = evidence.reference
    reference = reference and replace(reference, images_NHWC=rows_of(reference.images_NHWC))
    return replace(
        evidence, generated=of(evidence.generated), float_model=of(evidence.float_model), reference=reference
    )


@pytest.fixture
def quick_distances(monkeypatch):
    """Fréchet distances of 2,048 features take a minute here; the features are what these tests are about."""

    def gap(generated_NF: Tensor, reference_MF: Tensor, seed: int) -> libraries.Scored:
        return float((generated_NF.mean(0) - reference_MF.mean(0)).norm()), {}

    monkeypatch.setattr(libraries, "FID", dict.fromkeys(libraries.FID, gap))


pytestmark = pytest.mark.usefixtures("quick_distances")


def test_every_metric_gives_the_same_of_a_store_as_of_a_tensor(every_network, tmp_path):
    stored = {}
    for video, evidence in ((False, image_evidence()), (True, video_evidence())):
        generated = in_a_store(evidence.generated, tmp_path / f"generated {video}")
        assert isinstance(generated.pixels, StoredRows) and generated.is_video == video
        stored[video] = generated, in_a_store(evidence.float_model, tmp_path / f"float {video}")
    for name, video in CASES:
        in_memory = given(name, video)
        generated, float_model = (replace(samples, prompts=in_memory.generated.prompts) for samples in stored[video])
        (entries, values), (expected, expected_values) = (
            evaluate_samples([name], each)
            for each in (replace(in_memory, generated=generated, float_model=float_model), in_memory)
        )
        assert expected[name]["status"] == "ok", (name, expected[name]["reason"])
        assert entries == expected, name
        assert values.keys() == expected_values.keys(), name
        for one, other in zip(values.values(), expected_values.values(), strict=True):
            np.testing.assert_array_equal(one.values_N, other.values_N, err_msg=name)
            assert one.yes_no == other.yes_no


def test_no_metric_asks_for_more_bytes_than_it_may_or_keeps_what_it_has_read(every_network, monkeypatch):
    for name, video in CASES:
        in_memory = given(name, video)
        one = in_memory.generated.pixels[0].nbytes
        limit_bytes = 2 * one
        monkeypatch.setattr(batches, "BYTES", limit_bytes)
        watched: list[Watched] = []

        def watch(rows: Tensor, kept: list = watched, limit: int = limit_bytes) -> Watched:
            kept.append(Watched(rows, limit))
            return kept[-1]

        entries, _ = evaluate_samples([name], rewrapped(in_memory, watch))
        assert entries[name]["status"] == "ok", (name, entries[name]["reason"])
        assert any(rows.read_bytes >= rows.rows.nbytes for rows in watched), name
        for rows in watched:  # of six samples or more: the batch in hand and the one before it
            assert rows.largest_alive <= 2 * limit_bytes, (name, rows.shape)


def test_no_metric_but_collapse_looks_at_samples_that_diverged(every_network):
    for name, video in CASES:
        good = given(name, video)
        latents = good.generated.latents.clone()
        latents[3].flatten()[0] = float("nan")
        broken = replace(good, generated=replace(good.generated, latents=latents))
        entry = evaluate_samples([name], broken)[0][name]
        if name == "collapse":
            assert entry["value"] == pytest.approx(1 / 6) and "non-finite latents" in entry["passport"]["alarmed"]
        else:
            assert entry["status"] == "skipped" and "1 samples are not finite (3)" in entry["reason"], name
        paired = replace(good, float_model=good.generated, generated=good.generated)
        paired = replace(paired, float_model=broken.generated)
        status = evaluate_samples([name], paired)[0][name]["status"]
        assert status == ("skipped" if known_metrics()[name].paired else "ok"), name


def test_what_a_network_makes_no_number_of_fails_and_is_not_compared(every_network, monkeypatch):
    for name in ("accuracy", "torch_fidelity/precision_judge", "torch_fidelity/is_judge"):
        evidence = rewrapped(image_evidence(), lambda rows: rows.clone())
        judge = replace(evidence.judge, module=type(evidence.judge.module)())
        judge.module.mix_48F.data[0] = float("nan")
        entry = evaluate_samples([name], replace(evidence, judge=judge))[0][name]
        assert (entry["status"], entry["value"]) == ("failed", None) and "NaN or infinity" in entry["reason"], name


def test_the_features_of_a_store_are_found_once(evidence, tmp_path):
    generated, looked = in_a_store(evidence.generated, tmp_path), []
    judge = replace(evidence.judge, module=type(evidence.judge.module)().eval())
    judge.module.register_forward_pre_hook(lambda *_: looked.append(1))
    given_ = replace(evidence, generated=generated, judge=judge, resamples=4)
    names = ["accuracy", "torchmetrics/is_judge", "torch_fidelity/is_judge"]
    evaluate_samples(names, given_)
    evaluate_samples(names, replace(given_, seed=1))
    assert len(looked) == 1, "one batch, looked at once"


def test_the_hash_of_the_float_models_set_is_that_of_its_bytes(evidence, tmp_path):
    float_model = in_a_store(evidence.float_model, tmp_path)
    of_store = against_float(replace(evidence, float_model=float_model)).reference
    assert of_store.sha256 == against_float(evidence).reference.sha256 == images_sha256(evidence.float_model.pixels)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 100])
def test_frames_come_in_order_whatever_videos_they_are_of(at_once, monkeypatch):
    videos = torch.arange(4 * 3 * 2).reshape(4, 3, 2, 1, 1).expand(4, 3, 2, 2, 3).to(torch.uint8)
    monkeypatch.setattr(batches, "BYTES", at_once * 4 * 2 * 2 * 3)
    seen = list(batches.frames(videos, held=4))
    assert all(len(batch) == at_once for batch in seen[:-1])
    assert torch.equal(torch.cat(seen), videos.flatten(0, 1))
