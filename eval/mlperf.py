"""What MLPerf Inference scores generated pictures by (github.com/mlcommons/inference, text_to_image/tools), and what it accepts.

    mlperf/clip_score   100 · cosine of picture and prompt, CLIP ViT-B/32 of OpenAI, mean over pictures (not cut off at 0)
    mlperf/fid          Fréchet distance to COCO-2014's moments (its val2014.npz) in FID's Inception as pytorch-fid calls it: [0, 1], bilinear
                        without antialiasing to 299 × 299, then [−1, 1]

Accepted in its closed division (tools/submission, submission checker): SDXL base 1.0 within 2 % of the reference's FID of 23.48 and 0.2 % of its CLIP
score of 31.75, drawn as conf/protocol/mlperf_sdxl.yaml says. The passport names the window and whether the value lies in it; of another model,
or otherwise drawn, that says nothing. Of videos: eval/mlperf_wan.py.

Departs: its open_clip mends prompts with ftfy, which changes nothing in ASCII.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ditbench.eval import frechet
from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.batches import remembered
from ditbench.eval.clip import HUB, clip_here, embed_images, embed_texts, load_clip, need_prompts
from ditbench.eval.features import channels_first, device_of, full_precision
from ditbench.eval.hpsv2 import clean
from ditbench.eval.inception import port_here, torch_fidelity_network, torch_fidelity_upstream
from ditbench.eval.influence import spread
from ditbench.eval.passport import need_samples, passport
from ditbench.eval.per_sample import mean_or_share, pseudo_values
from ditbench.eval.prompt_lengths import cut_off
from ditbench.eval.statistics import INFLUENCE, INFLUENCE_OF_LOG, has_a_logarithm, student_of_log
from ditbench.eval.weights import find_weights, stored_sha256, weights_folder
from ditbench.harness.samples.samples import Rows

CLIP_WINDOW, FID_WINDOW = (31.68631873, 31.81331801), (23.01085758, 23.95007626)
WINDOW_OF = "SDXL base 1.0 drawn by MLPerf's protocol, 5,000 pictures; of anything else it says nothing"
MOMENTS, MOMENTS_FILE = "mlperf-val2014", "val2014.npz"
SIDE, BATCH = 299, 32


def _moments_here() -> str | None:
    here = (weights_folder() / MOMENTS_FILE).is_file()
    return None if here else f"COCO-2014's moments are not here; `ditbench data fetch {MOMENTS}`"


@metric("mlperf/clip_score", better="higher", asks=("prompts",), needs=(clip_here("b32"),))
def clip_score(evidence: Evidence) -> Measurement:
    """100 × cosine of picture and prompt, CLIP ViT-B/32, mean over the samples, as MLPerf's SDXL is scored."""
    need_samples(evidence, 1)
    images_NHWC, texts = evidence.generated.images_NHWC, need_prompts(evidence.generated)
    clip = load_clip(HUB["b32"], evidence.device)
    cleaned = tuple(clean(text) for text in texts)
    cosine_N = (embed_images(clip, images_NHWC).double() * embed_texts(clip, cleaned).double()).sum(dim=1)
    found = mean_or_share(
        evidence, 100.0 * cosine_N, "ditbench mlperf/clip_score", "ditbench", **clip.passport,
        resize="bicubic, short side, centre crop", antialias=True, scale=100.0, text="HTML unescaped; no ftfy",
        prompts_not_ascii=sum(not text.isascii() for text in texts), **cut_off(clip.tokenizer, clip.max_tokens, cleaned),
    )  # fmt: skip
    found.passport.update(window(CLIP_WINDOW, found.value))
    return found


@metric("mlperf/fid", better="lower", needs=(_moments_here, port_here))
def fid(evidence: Evidence) -> Measurement:
    """Fréchet distance to COCO-2014's moments in Inception's features, as MLPerf's SDXL is scored."""
    n = need_samples(evidence, 2)
    images_NHWC = evidence.generated.images_NHWC
    if problem := _moments_here():
        raise MetricSkipped(problem)
    reference, sha256 = read_moments(weights_folder() / MOMENTS_FILE)
    path, weights_sha256 = find_weights(torch_fidelity_upstream(), port_here)
    generated_NF = features(images_NHWC, load_network(path, weights_sha256, evidence.device)).double().numpy()
    width = generated_NF.shape[1]
    if len(reference[0]) != width:
        raise MetricSkipped(f"{MOMENTS_FILE} has moments of {len(reference[0])} features, and Inception gives {width}")
    value, influence = frechet.distance_to(generated_NF, reference), frechet.influence_to(generated_NF, reference)
    strata_N = evidence.design.strata_N
    found = spread(influence, strata_N)
    low, high = student_of_log(value, found)
    settings: dict[str, Any] = {"reference_moments": f"mu and sigma of {MOMENTS_FILE}", "reference_sha256": sha256}
    settings |= {"estimator": "moments of the samples, covariance over n − 1", "design": evidence.design.name}
    settings |= {"n_dependence": "biased upwards by about b / n: MLPerf's n is 5,000"}
    settings |= {"ci_method": INFLUENCE_OF_LOG if has_a_logarithm(value, found) else INFLUENCE}
    if n <= width:
        settings["note"] = f"n = {n} is not above the feature width {width}: compare at equal n only"
    card = passport(
        "ditbench mlperf/fid", "torch-fidelity", reference="COCO-2014 (MLPerf's moments)", dtype="float32, moments float64",
        weights_sha256=weights_sha256, features=f"Inception {path.name}", resize="bilinear to 299, in floats",
        antialias=False, **settings, **window(FID_WINDOW, value),
    )  # fmt: skip
    kept = pseudo_values(evidence, value, frechet.contributed(influence, width, strata_N))
    return Measurement(value, (max(low, 0.0), high), n, card, kept)


def window(accepted: tuple[float, float], value: float) -> dict[str, Any]:
    """The passport's three fields about what MLPerf accepts."""
    low, high = accepted
    return {"window": [low, high], "in_window": bool(low <= value <= high), "window_of": WINDOW_OF}


def read_moments(path: Path) -> tuple[frechet.Moments, str]:
    """mu (F,) and sigma (F, F) of an .npz, and its SHA-256; MetricSkipped where it has not both."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean_F, cov_FF = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
        if mean_F.ndim != 1 or cov_FF.shape != (len(mean_F), len(mean_F)):
            raise ValueError(f"mu {mean_F.shape}, sigma {cov_FF.shape}")
    except (OSError, ValueError, KeyError, EOFError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MetricSkipped(
            f"{path}: not mu and sigma ({reason}); delete it and `ditbench data fetch {MOMENTS}`"
        ) from error
    return frechet.moments_of(mean_F, cov_FF), stored_sha256(path)


@cache
def load_network(weights: Path, sha256: str, device: torch.device) -> nn.Module:
    """torch-fidelity's Inception behind pytorch-fid's preparation: uint8 (B, 3, H, W) → pooled features (B, 2048)."""
    return AsPytorchFid(torch_fidelity_network(weights, sha256, device).network)


class AsPytorchFid(nn.Module):
    """The layers of a network up to its pool, after [0, 1] → 299 × 299 → [−1, 1]."""

    def __init__(self, inception: Any) -> None:
        super().__init__()
        names = [name for name, _ in inception.named_children()]
        self.layers = nn.ModuleList(list(inception.children())[: names.index("AvgPool") + 1])

    def forward(self, images_B3HW: Tensor) -> Tensor:
        unit = interpolate(images_B3HW.float() / 255.0, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = 2.0 * unit - 1.0
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1)


def features(images_NHWC: Rows, network: Callable[[Tensor], Tensor] | nn.Module) -> Tensor:
    """(N, width), float32 on the CPU."""
    device = device_of(network) if isinstance(network, nn.Module) else torch.device("cpu")

    def of_all() -> Tensor:
        with full_precision():
            return torch.cat([network(batch.to(device)).float().cpu() for batch in channels_first(images_NHWC, BATCH)])

    return remembered(images_NHWC, network, "pooled features", of_all)
