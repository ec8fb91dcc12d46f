"""The definitions of VBench-style metrics, on numbers counted by hand."""

from __future__ import annotations

import pytest
import torch

from ditbench.eval import vbench_style, video_judges, video_motion, video_text
from ditbench.eval.flow import Flow


def test_flickering_is_one_minus_the_mean_step_between_frames_over_255():
    levels = torch.tensor([10, 61, 61], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 4, 4, 3)
    assert vbench_style.flickering(levels).item() == pytest.approx(1 - (51 + 0) / 2 / 255)
    assert vbench_style.flickering(levels[1:]).item() == 1.0


def test_consistency_averages_the_cosines_to_the_first_and_the_previous_frame():
    c, s = 0.6, 0.8
    features = torch.tensor([[1.0, 0.0], [c, s], [0.0, 1.0]])
    # frame 1: first c, previous c; frame 2: first 0, previous s
    assert vbench_style.consistency(features).item() == pytest.approx((c + c + 0 + s) / 4)


def test_consistency_counts_an_opposite_frame_as_zero_and_not_as_minus_one():
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    assert vbench_style.consistency(features).item() == pytest.approx((0 + 0 + 0 + 1) / 4)


def test_a_video_is_dynamic_when_enough_pairs_are_faster_than_the_threshold():
    assert video_motion.dynamic_threshold(256) == 6.0 and video_motion.dynamic_threshold(32) == 0.75
    assert [video_motion.dynamic_pairs(frames) for frames in (2, 4, 6, 14, 16, 49)] == [1, 1, 2, 4, 4, 12]
    fastest = torch.tensor([0.76, 0.76, 0.75, 0.0, 0.9, 0.8])
    assert video_motion.is_dynamic(fastest, side=32, frames=16)
    assert not video_motion.is_dynamic(fastest[:5], side=32, frames=16)
    assert not video_motion.is_dynamic(fastest, side=64, frames=16)


def test_the_fastest_speed_is_the_mean_of_the_top_five_percent():
    speed = torch.zeros(2, 5, 8)
    speed[0, 0, :3] = torch.tensor([4.0, 2.0, 1.0])  # 5 % of 40 pixels are two
    torch.testing.assert_close(video_motion.fastest(speed), torch.tensor([3.0, 0.0]))
    assert video_motion.fastest(torch.full((1, 2, 2), 7.0)).item() == 7.0


def test_smoothness_compares_odd_frames_and_leaves_the_last_of_an_even_number_out():
    left_out = torch.tensor([30, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 4, 4, 3)
    middle = torch.full((1, 4, 4, 3), 81, dtype=torch.uint8)
    assert video_motion.smoothness(left_out, middle).item() == pytest.approx(1 - 51 / 255)


def test_a_frame_between_two_of_a_pan_is_found_half_way():
    """With the true flow of a pan of 2 pixels, the middle frame is the one moved by 1."""
    wide = torch.rand(16, 24, 3, generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    pan = torch.stack([wide[:, t : t + 16] for t in (0, 1, 2)])
    to_after = torch.tensor([-2.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 16, 16)

    def true_flow(before, after):
        return to_after if torch.equal(before, pan[:1]) else -to_after

    middle = video_motion.interpolated(pan[::2], Flow("test", true_flow, {}))
    torch.testing.assert_close(middle[:, :, 1:-1], pan[1:2, :, 1:-1])


def test_pixels_without_a_way_back_and_motion_boundaries_are_occluded():
    still, moving = torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8)
    moving[:, 0, :, 4:] = 2.0  # the right half moves, and says that it moves back
    assert not video_motion.occluded(still, still).any()
    boundary = video_motion.occluded(moving, -moving)
    assert boundary[0, :, 3].all() and not boundary[0, :, :2].any() and not boundary[0, :, 4:].any()
    one_way = video_motion.occluded(moving, still)
    assert one_way[0, :, 4:].all() and not one_way[0, :, :3].any()


def test_small_disagreement_of_way_and_way_back_is_no_occlusion():
    way = torch.full((1, 2, 4, 4), 3.0)  # |w|² = 18, so up to 0.01 · (18 + |ŵ|²) + 0.5 is allowed
    assert not video_motion.occluded(way, -way + 0.6).any()  # 0.72 < 0.01 · (18 + 11.52) + 0.5
    assert video_motion.occluded(way, -way + 0.7).all()  # 0.98 > 0.01 · (18 + 10.58) + 0.5


def test_the_warping_error_is_the_mean_square_over_visible_pixels_only():
    frame, warped = torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4)
    warped[:, :, 0, 0], warped[:, 0, 0, 1] = 1.0, 0.6
    hidden = torch.tensor([[[True, False, False, False]], [[True, True, True, True]]])
    errors = video_motion.masked_error(frame, warped, hidden)
    torch.testing.assert_close(errors[0], torch.tensor(0.36 / 9))
    torch.testing.assert_close(errors[1], torch.tensor((1.0 + 0.36 / 3) / 4))


def test_neighbouring_frames_are_compared_with_each_other_and_not_with_the_first():
    features = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
    assert video_text.neighbour_cosine(features).item() == pytest.approx((0.6 + 0.8) / 2)


def test_vbench_looks_at_the_middles_of_eight_equal_parts():
    assert video_text.middle_frames(16, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert video_text.middle_frames(49, 8) == [2, 8, 14, 20, 26, 32, 38, 45]
    assert video_text.middle_frames(3, 8) == [0, 1, 2]


def test_resizing_keeps_the_aspect_and_only_the_antialiased_one_is_in_whole_levels():
    frames = torch.randint(0, 256, (2, 3, 40, 60), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    as_pil = video_judges.resize_short_side(frames, 24, "bicubic", antialias=True)
    as_vbench = video_judges.resize_short_side(frames, 24, "bicubic", antialias=False)
    assert as_pil.shape == as_vbench.shape == (2, 3, 24, 36)
    assert torch.equal(as_pil, as_pil.round()) and as_pil.min() >= 0 and as_pil.max() <= 255
    assert not torch.equal(as_vbench, as_vbench.round()) and as_vbench.std() > 1.2 * as_pil.std()
    cropped = video_judges.center_crop(as_pil, 24)
    assert torch.equal(cropped, as_pil[..., 6:30])


def test_a_long_side_that_comes_out_between_two_pixels_is_cut_as_torchvisions_resize_does():
    """int(side · long / short): 24 · 61 / 40 = 36.6."""
    for antialias in (True, False):
        resized = video_judges.resize_short_side(torch.zeros(1, 3, 40, 61), 24, "bilinear", antialias)
        assert resized.shape == (1, 3, 24, 36)


@pytest.mark.parametrize(("width", "left"), [(25, 0), (27, 2), (29, 2), (31, 4)])
def test_an_odd_rest_is_cropped_as_torchvisions_center_crop_does(width, left):
    """int(round((width − side) / 2)), in Python's rounding: 0.5 → 0, 1.5 → 2, 2.5 → 2, 3.5 → 4."""
    frames = torch.arange(width).float().expand(1, 3, 24, width)
    assert video_judges.center_crop(frames, 24)[0, 0, 0].tolist() == list(range(left, left + 24))


def test_musiq_sees_large_frames_smaller_and_small_ones_as_they_are():
    assert vbench_style.musiq_frames(torch.zeros(1, 3, 300, 1024, dtype=torch.uint8)).shape == (1, 3, 150, 512)
    small = torch.randint(0, 256, (1, 3, 20, 30), dtype=torch.uint8)
    torch.testing.assert_close(vbench_style.musiq_frames(small), small / 255.0)
