from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import ditbench
from ditbench.eval import batches, collapse
from ditbench.eval.base import Evidence, evaluate
from ditbench.eval.collapse import alarmed, alarms
from ditbench.eval.reference import load_reference
from ditbench.harness.samples.samples import Samples

N, FRAMES, SIDE = 10, 6, 32


def scenes(seed: int = 0) -> torch.Tensor:
    """Smooth pictures that drift by one pixel a frame, uint8 (N, F, H, W, 3)."""
    random = torch.Generator().manual_seed(seed)
    small = torch.rand(N, 3, 8, 8, generator=random) * 160 + 40
    wide = torch.nn.functional.interpolate(small, size=SIDE + FRAMES, mode="bicubic")
    frames = [wide[..., :SIDE, t : t + SIDE] for t in range(FRAMES)]
    return torch.stack(frames, dim=1).permute(0, 1, 3, 4, 2).round().clamp(1, 254).to(torch.uint8).contiguous()


def broken(kind: str) -> torch.Tensor:
    """The scenes, all samples collapsed in one way."""
    videos, random = scenes(), torch.Generator().manual_seed(1)
    if kind == "blank":
        return torch.full_like(videos, 90)
    if kind == "saturated":
        return torch.where(videos > 128, 255, 0).to(torch.uint8)
    if kind == "frozen":
        return videos[:, :1].expand_as(videos).contiguous()
    noise = torch.randn(videos.shape, generator=random) * 40 + 128
    return noise.clamp(1, 254).to(torch.uint8)


@pytest.mark.parametrize("kind", ["blank", "saturated", "frozen", "noise"])
def test_each_way_to_collapse_raises_its_alarm_for_every_sample(kind):
    found = alarms(Samples(broken(kind)), Samples(scenes()))
    assert found[kind]["share"] == 1.0 and found[kind]["n"] == N
    assert kind in alarmed(found)


def test_what_the_float_model_draws_is_no_alarm_and_neither_is_a_good_sample():
    assert alarmed(alarms(Samples(scenes()), Samples(scenes(seed=1)))) == []
    assert alarmed(alarms(Samples(scenes()))) == []
    for kind in ("blank", "saturated", "frozen", "noise"):
        assert alarmed(alarms(Samples(broken(kind)))) != [], "without the float model a collapse is still one"
        assert alarmed(alarms(Samples(broken(kind)), Samples(broken(kind)))) == []


def test_the_float_models_own_flat_background_is_no_alarm():
    """A dark square on black: 94 % of the values at 0, in both models; a little more in the quantized one."""
    dark = torch.zeros(N, FRAMES, SIDE, SIDE, 3, dtype=torch.uint8)
    dark[:, :, 4:12, 4:12] = 70
    darker = dark.clone()
    darker[:, :, 4:6, 4:12] = 0
    assert alarmed(alarms(Samples(darker))) != []
    assert alarmed(alarms(Samples(darker), Samples(dark))) == []


def test_a_float_sample_just_off_the_threshold_is_not_clear_of_it():
    """Half of the picture black and a little less than half: the same scene, on two sides of the threshold."""
    over, under = scenes(), scenes()
    over[:, :, :17] = 0
    under[:, :, :15] = 0
    assert alarms(Samples(over))["saturated"]["share"] == 1.0
    assert alarms(Samples(under))["saturated"]["share"] == 0.0
    assert alarms(Samples(over), Samples(under))["saturated"]["share"] == 0.0


def test_one_saturated_channel_is_enough():
    red = scenes()
    red[..., 0] = 255
    assert alarms(Samples(red), Samples(scenes()))["saturated"]["share"] == 1.0


def test_a_float_sample_that_is_nearly_blank_or_nearly_still_is_not_clear_of_the_threshold_either():
    def stripes(levels: int, step: int) -> Samples:
        """Half of the pixels `levels` brighter; one pixel in ten changes by `step` each frame."""
        videos = torch.full((N, FRAMES, 20, 20, 3), 90, dtype=torch.uint8)
        videos[:, :, ::2] += levels
        videos[:, 1::2, :2] += step
        return Samples(videos)

    assert alarms(stripes(2, 1))["blank"]["share"] == 1.0 and alarms(stripes(6, 1))["blank"]["share"] == 0.0
    assert alarms(stripes(2, 1), stripes(6, 1))["blank"]["share"] == 0.0
    assert alarms(stripes(2, 1), stripes(12, 1))["blank"]["share"] == 1.0
    assert alarms(stripes(50, 0), stripes(50, 1))["frozen"]["share"] == 0.0
    assert alarms(stripes(50, 0), stripes(50, 3))["frozen"]["share"] == 1.0


def test_saturation_alarms_where_the_float_models_own_black_is_a_third_of_the_picture():
    """Digits on black: a third of their values are at 0, and a collapse of them must still be seen."""
    digits = scenes()
    digits[:, :, :11] = 0
    collapsed = torch.where(digits > 128, 255, 0).to(torch.uint8)
    assert alarms(Samples(collapsed), Samples(digits))["saturated"]["share"] == 1.0


@pytest.mark.parametrize("added, alarm", [(0.25, False), (0.4, True)])
def test_white_noise_alarms_by_its_share_of_the_variance_beyond_the_float_models_own(added, alarm):
    """The float model's pictures have grain already, a third of their variance."""
    plain = scenes().float()
    plain = (plain - plain.mean(dim=(2, 3), keepdim=True)) / plain.std(dim=(2, 3), keepdim=True)
    grain, noise = (torch.randn(plain.shape, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    own = (2 / 3) ** 0.5 * plain + (1 / 3) ** 0.5 * grain

    def pictures(values):
        return Samples((128 + 25 * values).round().clamp(0, 255).to(torch.uint8))

    drawn = pictures((1 - added) ** 0.5 * own + added**0.5 * noise)
    assert alarms(drawn, pictures(own))["noise"]["share"] == float(alarm)
    assert alarms(drawn)["noise"]["share"] == 0.0, "alone, neither is noise"


def test_a_flat_colour_is_blank_although_its_channels_differ():
    red = torch.tensor([220, 10, 10], dtype=torch.uint8).expand(N, FRAMES, SIDE, SIDE, 3).contiguous()
    assert alarms(Samples(red))["blank"]["share"] == 1.0


def test_rounding_noise_on_a_blank_frame_is_blank_and_not_noise():
    videos = torch.randint(90, 93, (N, FRAMES, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0))
    found = alarms(Samples(videos.to(torch.uint8)), Samples(scenes()))
    assert found["blank"]["share"] == 1.0 and found["noise"]["share"] == 0.0


def test_white_noise_has_ratio_one_and_latent_noise_shows_at_a_coarser_scale():
    white = Samples(broken("noise"))
    torch.testing.assert_close(collapse.numbers(white)["noise"], torch.ones(N), atol=0.12, rtol=0)
    random = torch.Generator().manual_seed(2)
    latent = torch.rand(N, 3, 32, 32, generator=random) * 200 + 25
    pixels = latent.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3).permute(0, 2, 3, 1).to(torch.uint8)
    assert (collapse.numbers(Samples(pixels))["noise"] > collapse.NOISE_RATIO).all()
    assert (collapse._neighbour_ratio(pixels.permute(0, 3, 1, 2).float()) < 0.2).all()


def test_the_numbers_that_are_compared_are_those_one_counts_by_hand():
    ramp = torch.arange(4, dtype=torch.uint8).view(1, 1, 4, 1) * 80  # columns 0, 80, 160, 240
    video = ramp.expand(3, 4, 4, 3).contiguous()
    assert collapse.spread(video).item() == pytest.approx((80**2 * (1.5**2 + 0.5**2) / 2) ** 0.5)
    assert collapse.saturation(video).item() == 0.25
    assert collapse.change(video).item() == 0.0
    # Differences along rows 80 and along columns 0: (80² + 0) / 2, over twice the variance 8000.
    assert collapse.noisiness(video).item() == pytest.approx(3200 / 16000)
    steps = torch.tensor([10, 10, 40], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 4, 4, 3)
    assert collapse.change(steps).item() == 15.0


def test_one_frame_that_is_unlike_the_others_makes_no_alarm_and_hides_none():
    video = torch.full((5, 4, 4, 3), 90, dtype=torch.uint8)
    video[2, :2] = 255  # half of one frame in five
    assert collapse.spread(video).item() == 0.0, "the median frame is blank"
    assert collapse.saturation(video).item() == pytest.approx(0.1), "over all frames"


def test_channels_that_differ_are_no_variance_and_noise_in_a_coloured_picture_is_noise():
    """Red 60 brighter than green and blue everywhere: 30 % of all variance would be that of the colours."""
    noise_F3HW = 20 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    coloured_F3HW = noise_F3HW + torch.tensor([60.0, 0.0, 0.0]).view(3, 1, 1)
    steps = sum(noise_F3HW.diff(dim=dim).square().mean() for dim in (2, 3)) / 2
    expected = float(steps / 2 / noise_F3HW.flatten(2).var(dim=2, correction=0).mean())
    assert collapse._neighbour_ratio(coloured_F3HW).item() == pytest.approx(expected, rel=1e-4)


def test_pictures_are_averaged_as_long_as_sixteen_pixels_are_left():
    """Noise of 2×2 pixels: of 32 pixels a side the mean over 2 is looked at, of 30 it is not."""
    blocks = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(6)) * 200 + 25
    whole = blocks.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).permute(0, 2, 3, 1).to(torch.uint8)
    assert collapse.noisiness(whole).item() == pytest.approx(1.0, abs=0.15)
    assert collapse.noisiness(whole[:, :30, :30]).item() < 0.65


def test_latents_that_are_not_finite_alarm_and_latents_that_were_not_kept_do_not():
    latents = torch.zeros(N, 4, 2, 2)
    latents[:3, 0, 0, 0] = float("inf")
    samples = Samples(scenes(), latents=latents)
    assert alarms(samples)["non-finite latents"]["share"] == pytest.approx(0.3)
    assert "non-finite latents" not in alarms(replace(samples, latents=None))


def test_images_have_no_frozen_alarm_and_all_the_others():
    images = Samples(broken("blank")[:, 0], latents=torch.zeros(N, 1))
    assert set(alarms(images)) == set(collapse.ALARMS) - {"frozen"}
    assert alarmed(alarms(images)) == ["blank"]


def of_few(count: int) -> torch.Tensor:
    """The first `count` scenes again and again, each time with a little grain of its own."""
    grain = torch.randint(-2, 3, scenes().shape, generator=torch.Generator().manual_seed(4))
    return (scenes()[torch.arange(N) % count].int() + grain).clamp(1, 254).to(torch.uint8)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_pictures_that_come_again_and_again_are_mode_collapse(count):
    found = alarms(Samples(of_few(count)), Samples(scenes()))
    assert found["repeated"]["share"] == 1.0 and "repeated" in alarmed(found)
    assert found["noise"]["share"] == found["blank"]["share"] == 0.0, "no single picture is bad"
    assert alarms(Samples(broken("blank")), Samples(scenes()))["repeated"]["share"] == 0.0, "blank has its own alarm"
    images = alarms(Samples(of_few(count)[:, 0]), Samples(scenes()[:, 0]))
    assert images["repeated"]["share"] == 1.0


def test_pictures_that_drift_towards_one_are_alike_before_they_are_repeated():
    towards_one = (0.4 * scenes().float() + 0.6 * scenes()[:1].float()).to(torch.uint8)
    found = alarms(Samples(towards_one), Samples(scenes()))
    assert alarmed(found) == ["alike"] and found["alike"]["share"] > 0.8
    halfway = (0.6 * scenes().float() + 0.4 * scenes()[:1].float()).to(torch.uint8)
    assert alarmed(alarms(Samples(halfway), Samples(scenes()))) == []


def test_what_the_float_model_repeats_is_its_own():
    assert alarmed(alarms(Samples(of_few(2)), Samples(of_few(2)))) == []
    assert alarmed(alarms(Samples(scenes()), Samples(of_few(2)))) == []


def test_each_sample_is_held_against_its_own_counterpart_and_not_against_the_usual_one():
    twins = scenes()
    twins[1] = (twins[0].int() + 3).to(torch.uint8)  # two that the float model draws nearly alike as well
    distance_N = collapse.numbers(Samples(twins))["repeated"]
    assert (distance_N[:2] < 0.25 * distance_N.mean()).all()
    found = alarms(Samples(twins), Samples(twins))
    assert found["repeated"]["share"] == found["alike"]["share"] == 0.0


def test_without_the_float_model_only_the_same_picture_is_a_repetition():
    twice = scenes()
    twice[1] = twice[0]
    found = alarms(Samples(twice))
    assert found["repeated"]["share"] == pytest.approx(0.2) and found["alike"]["share"] == 0.0


def test_a_single_sample_repeats_nothing():
    found = alarms(Samples(scenes()[:1]), Samples(scenes(seed=1)[:1]))
    assert found["repeated"]["share"] == found["alike"]["share"] == 0.0


def test_distances_to_the_others_are_those_of_all_pairs(monkeypatch):
    thumbnail_ND = torch.rand(7, 12, generator=torch.Generator().manual_seed(0)) * 255
    pairs_NN = (thumbnail_ND[:, None] - thumbnail_ND[None]).square().mean(dim=2)
    others_NN = pairs_NN[~torch.eye(7, dtype=torch.bool)].view(7, 6)
    monkeypatch.setattr(collapse, "DISTANCES_HELD", 3 * 7)
    torch.testing.assert_close(collapse.nearest(thumbnail_ND), others_NN.amin(dim=1).sqrt(), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(collapse.to_the_others(thumbnail_ND), others_NN.mean(dim=1).sqrt())


def test_thumbnails_are_of_the_first_the_middle_and_the_last_frame():
    video = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 32, 32, 3) * 10
    assert collapse.thumbnail(video).view(3, -1).unique(dim=1).flatten().tolist() == [0.0, 20.0, 40.0]
    assert collapse.thumbnail(video[:1]).shape == (3 * 16 * 16,)


def test_long_videos_are_looked_at_some_frames_at_a_time_and_once(monkeypatch):
    samples = Samples(scenes(), latents=torch.zeros(N, 1))
    whole = collapse.numbers(samples)
    assert collapse.numbers(samples)["noise"] is whole["noise"], "a set's numbers are found once"
    monkeypatch.setattr(batches, "BYTES", 2 * collapse.HELD * SIDE * SIDE * 3)  # two of six frames
    few = collapse.numbers(Samples(scenes(), latents=torch.zeros(N, 1)))
    for name, value_N in whole.items():
        torch.testing.assert_close(few[name], value_N)


def test_a_run_is_alarmed_above_one_sample_in_ten():
    videos = scenes()
    videos[0] = 90
    assert alarmed(alarms(Samples(videos))) == []
    videos[1] = 90
    assert alarmed(alarms(Samples(videos))) == ["blank", "frozen"]


def test_the_metric_counts_a_sample_once_however_many_alarms_it_raises():
    videos = scenes()
    videos[:3] = 90  # blank and frozen
    videos[3] = broken("noise")[3]
    entry = evaluate(["collapse"], Evidence(Samples(videos), Samples(scenes())))["collapse"]
    low, high = entry["ci95"]
    assert entry["value"] == pytest.approx(0.4) and low < 0.4 < high
    assert entry["n"] == N and entry["better"] == "lower" and not entry["paired"]
    passport = entry["passport"]
    assert passport["alarms"]["blank"]["share"] == pytest.approx(0.3) and passport["reference"] is not None
    assert passport["alarmed"] == ["blank", "frozen"]


def test_a_float_model_that_does_not_pair_row_by_row_is_an_error():
    with pytest.raises(ValueError, match="same seeds"):
        alarms(Samples(scenes()), Samples(scenes()[:-1]))


def test_black_noise_and_repeated_digits_alarm_on_real_ones_and_other_real_ones_do_not():
    """The alarms see pictures of the size of tiny-dit's, where nothing is coarser than 16 pixels."""
    digits = load_reference("digits-1797").images_NHWC[:]
    ours, theirs = Samples(digits[:200]), Samples(digits[200:400])
    assert alarmed(alarms(ours, theirs)) == [] and alarmed(alarms(theirs, ours)) == []
    noise = torch.randint(0, 256, ours.pixels.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    few = digits[torch.arange(200) % 10]
    for pixels, alarm in ((torch.zeros_like(noise), "blank"), (noise, "noise"), (few, "repeated")):
        assert alarm in alarmed(alarms(Samples(pixels), theirs)), alarm


def test_every_set_of_metrics_asks_for_the_alarms():
    for path in (Path(ditbench.__file__).parent / "conf" / "metrics").glob("*.yaml"):
        found = yaml.safe_load(path.read_text())
        if "names" not in found:  # it has those of the set it starts from
            found = yaml.safe_load((path.parent / f"{found['defaults'][0]}.yaml").read_text())
        assert "collapse" in found["names"], path.name
