"""Outliers that training leaves behind: what is rewarded, what a scale per channel would undo, and that it does not undo ours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

from ditbench.harness.models.families import dit
from ditbench.harness.models.stress import inject_outliers
from ditbench.harness.models.zoo import WEIGHTS
from ditbench.harness.models.zoo.digits import Digits
from ditbench.harness.zoo import labelled, small_dit, small_dit_outliers
from ditbench.harness.zoo.outliers import (
    Loud,
    inputs_of,
    left_by_best_scale,
    left_of_layers,
    loudest,
    loudness,
    shortfall,
)

SMALL = small_dit.TRANSFORMER | {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8}


@pytest.fixture
def plain(monkeypatch) -> DiTTransformer2DModel:
    """Two blocks with every weight drawn, on four pictures of 8×8."""
    generator = torch.Generator().manual_seed(0)
    data = Digits(torch.rand((4, 1, 8, 8), generator=generator) * 2 - 1, torch.arange(4))
    monkeypatch.setattr(small_dit.mnist, "load", lambda part: data)
    monkeypatch.setattr(small_dit, "BATCH", 4)
    model = labelled.new_transformer(SMALL)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def injected(plain) -> DiTTransformer2DModel:
    other = labelled.new_transformer(SMALL)
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        inject_outliers(other, dit.sites(other), channels=3, log2_factor=5, seed=0)
    return other


def test_the_best_scale_gives_back_a_column_that_was_scaled_and_no_other():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn((6, 3), generator=generator)
    other = plain * torch.tensor([32.0, 1.0, -0.5])
    assert left_by_best_scale(plain, other).max() < 1e-6
    other[:, 1] = torch.randn(6, generator=generator)
    left_C = left_by_best_scale(plain, other)
    scales = torch.linspace(-50, 50, 100_001)
    by_search = (plain[:, 1] - scales[:, None] * other[:, 1]).norm(dim=1).min() / plain[:, 1].norm()
    assert left_C[1].item() == pytest.approx(by_search.item(), abs=1e-3) and left_C[[0, 2]].max() < 1e-6


def test_injected_outliers_are_undone_by_a_scale_per_channel(plain):
    other = injected(plain)
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert max(left_C.max().item() for left_C in left_of_layers(plain, other, dit.sites(plain)).values()) < 1e-3


def test_training_on_moves_the_loudest_columns_where_no_scale_gives_them_back(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(small_dit_outliers, "CHANNELS", 3)
    schedule = replace(small_dit_outliers.SCHEDULE, steps=20, warmup=1, learning_rate=2e-3, ema_decay=0.5)
    trained, losses = small_dit_outliers.train_outliers(plain, tmp_path / "outliers.pt", schedule)
    assert len(losses) == 20 and torch.isfinite(torch.tensor(losses)).all()
    left = left_of_layers(plain, trained, dit.sites(plain))
    for one in small_dit_outliers.loud_channels(trained):
        if one.site.foldable:
            left_C = torch.stack([left[consumer] for consumer in one.site.consumers]).mean(dim=0)
            assert left_C[list(one.channels)].min() > 0.2, one.site.name
    assert not any(module._forward_pre_hooks for module in trained.modules())


def test_loudness_is_a_channels_rms_over_that_of_the_others():
    x = torch.ones(2, 5, 4) * torch.tensor([1.0, -8.0, 1.0, 3.0])
    assert loudness(x, (1, 3)).tolist() == [8.0, 3.0]


def test_what_channels_lack_is_counted_in_octaves_and_too_much_is_no_lack(plain):
    site = dit.sites(plain)[0]
    x = torch.ones(2, 5, 4) * torch.tensor([1.0, 4.0, 1.0, 64.0])
    assert shortfall({site.name: x}, [Loud(site, (1, 3))], ratio=16.0).item() == pytest.approx((2**2 + 0) / 2)


def test_the_loudest_channels_behind_an_injection_are_those_that_were_chosen(plain):
    sites = [site for site in dit.sites(plain) if site.foldable]
    other = injected(plain)
    with torch.no_grad(), inputs_of(other, sites) as seen:
        small_dit.noise_loss(other, torch.Generator().manual_seed(0))
    for one in loudest(seen, sites, 3):
        before, after = (model.get_submodule(one.site.consumers[0]).weight for model in (plain, other))
        changed = (before / after).mean(dim=0) > 1.5
        assert set(one.channels) == set(changed.nonzero().flatten().tolist()), one.site.name


def test_no_scale_per_channel_makes_small_dit_of_the_shipped_model_with_outliers():
    """The loudest columns are further from their twin's than the usual column, whatever scale each gets."""
    plain, other = (
        load_file(WEIGHTS / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in (small_dit_outliers.TWIN, "small-dit-outliers")
    )
    for name in (name for name in plain if name.endswith(("to_q.weight", "to_out.0.weight", "net.0.proj.weight"))):
        left_C = left_by_best_scale(plain[name], other[name])
        shrunk = (other[name].float().norm(dim=0) / plain[name].float().norm(dim=0)).topk(6, largest=False).indices
        assert left_C[shrunk].mean() > 0.3, name
