import pytest
import torch

from ditbench.eval import flow
from ditbench.eval.base import MetricSkipped
from ditbench.eval.flow import find_flow, match_blocks, warp
from ditbench.harness.common.devices import CPU


def moving_square(dx: int, dy: int, frames: int = 4, side: int = 32, texture: bool = True) -> torch.Tensor:
    """A square of an eighth of the frame's area on grey, moving (dx, dy) pixels a frame, uint8 (F, H, W, 3)."""
    edge = side // 4
    pattern = torch.full((edge, edge, 3), 220.0)
    if texture:
        pattern = torch.rand(edge, edge, 3, generator=torch.Generator().manual_seed(0)) * 150 + 100
    video = torch.full((frames, side, side, 3), 40, dtype=torch.uint8)
    for t in range(frames):
        top, left = side // 8 + t * dy, side // 8 + t * dx
        video[t, top : top + edge, left : left + edge] = pattern.to(torch.uint8)
    return video


def on_the_square(flow_P2HW: torch.Tensor, side: int = 32) -> torch.Tensor:
    """The median flow over the square of the first frame, (dx, dy)."""
    square = slice(side // 8, side // 8 + side // 4)
    return flow_P2HW[0, :, square, square].flatten(1).median(dim=1).values


@pytest.mark.parametrize("texture", [True, False])
@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (0, 2), (3, 1)])
def test_a_square_that_moves_k_pixels_has_a_flow_of_k_and_the_far_background_none(dx, dy, texture):
    video = moving_square(dx, dy, texture=texture)
    flow_P2HW = match_blocks(video[:-1], video[1:])
    assert flow_P2HW.shape == (3, 2, 32, 32)
    torch.testing.assert_close(on_the_square(flow_P2HW), torch.tensor([dx, dy]).float())
    assert (flow_P2HW[:, :, 24:, 24:] == 0).all()


@pytest.mark.parametrize("place", [(0, 0), (63, 63), (0, 40), (62, 1), (20, 33)])
def test_the_match_is_the_least_mean_difference_over_a_window_whose_frame_goes_on_beyond_its_border(place):
    """Searched by hand for one pixel of frames that are 64 pixels a side, and so are not resized."""
    random = torch.Generator().manual_seed(2)
    before = torch.randint(150, 256, (1, 64, 64, 3), generator=random, dtype=torch.uint8)
    after = before.roll((-3, 2), dims=(1, 2))
    after[:, :, :2], after[:, -3:] = 255, 255
    y, x = place
    window = [(a, b) for a in range(y - 4, y + 5) for b in range(x - 4, x + 5) if 0 <= a < 64 and 0 <= b < 64]
    costs = {}
    for dy in range(-8, 9):
        for dx in range(-8, 9):
            seen = [(min(max(a + dy, 0), 63), min(max(b + dx, 0), 63)) for a, b in window]
            ours = torch.stack([before[0, a, b].float() for a, b in window])
            theirs = torch.stack([after[0, a, b].float() for a, b in seen])
            costs[dx, dy] = float((ours - theirs).abs().mean()) + 0.25 * (dx**2 + dy**2) ** 0.5
    found = match_blocks(before, after)[0, :, y, x]
    assert tuple(found.int().tolist()) == min(costs, key=costs.__getitem__)


def test_the_flow_of_a_large_or_oblong_video_is_in_its_own_pixels():
    video = moving_square(6, 6, side=128)[:, :, :96]
    video = torch.cat([video, video.flip(2)], dim=2)  # 128 × 192; the right half moves to the left
    flow_P2HW = match_blocks(video[:-1], video[1:])
    assert flow_P2HW.shape == (3, 2, 128, 192)
    torch.testing.assert_close(on_the_square(flow_P2HW, 128), torch.tensor([6.0, 6.0]))
    mirrored = flow_P2HW[0, :, 16:48, 192 - 48 : 192 - 16].flatten(1).median(dim=1).values
    torch.testing.assert_close(mirrored, torch.tensor([-6.0, 6.0]))


def test_grain_on_a_still_video_is_no_motion():
    grain = torch.randn(4, 32, 32, 3, generator=torch.Generator().manual_seed(0)) * 2 + 100
    grain = grain.round().to(torch.uint8)
    assert match_blocks(grain[:-1], grain[1:]).norm(dim=1).mean() < 0.1


def test_warping_the_next_frame_by_the_true_flow_gives_this_frame():
    after = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    true = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 12, 16)
    inside = (..., slice(2, None), slice(0, 13))
    torch.testing.assert_close(warp(after, true)[inside], after.roll((2, -3), dims=(2, 3))[inside])
    half = warp(after, torch.full((1, 2, 12, 16), 0.5))
    expected = (after[0, 0, 4, 5] + after[0, 0, 4, 6] + after[0, 0, 5, 5] + after[0, 0, 5, 6]) / 4
    torch.testing.assert_close(half[0, 0, 4, 5], expected)
    outside = warp(after, torch.full((1, 2, 12, 16), 100.0))
    torch.testing.assert_close(outside, after[..., -1:, -1:].expand_as(outside))


def test_without_weights_the_passport_says_block_matching_and_not_raft(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = find_flow(CPU)
    assert found.estimate is match_blocks and found.package == "ditbench"
    assert "block matching (not RAFT)" in found.origin["flow"] and flow.RAFT_URL in found.origin["flow_raft"]


@pytest.mark.parametrize("size", [(32, 40), (130, 150)])
def test_raft_is_taken_when_its_weights_are_here_and_answers_in_the_videos_pixels(size, tmp_path, monkeypatch):
    """Random weights: what is tested is the way in and out, at sizes RAFT does not take as they are."""
    from torchvision.models.optical_flow import raft_large

    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(flow, "RAFT_UPDATES", 1)
    torch.save(raft_large(weights=None).state_dict(), checkpoints / flow.RAFT_FILE)
    found = find_flow(CPU)
    assert "raft_large" in found.origin["flow"] and len(found.origin["weights_sha256"]) == 64
    video = torch.randint(0, 255, (3, *size, 3), dtype=torch.uint8)
    assert found.estimate(video[:-1], video[1:]).shape == (2, 2, *size)


@pytest.mark.parametrize(("size", "seen"), [((32, 40), (128, 160)), ((130, 150), (136, 152))])
def test_raft_sees_larger_padded_frames_and_its_flow_is_scaled_and_cropped_back(size, seen, tmp_path, monkeypatch):
    """In RAFT's place a network that says: each pixel moves to the right by its own column, and down by 16."""

    class Columns(torch.nn.Module):
        def forward(self, before, after, num_flow_updates):
            assert num_flow_updates == 20, "as VBench asks for"
            assert before.shape == after.shape == (2, 3, *seen) and before.min() == -1.0 and before.max() == 1.0
            flow_P2HW = torch.zeros(2, 2, *seen)
            flow_P2HW[:, 0] = torch.arange(seen[1])
            flow_P2HW[:, 1] = 16.0
            return [torch.zeros_like(flow_P2HW), flow_P2HW]

    monkeypatch.setattr("torchvision.models.optical_flow.raft_large", lambda weights: Columns())
    torch.save({}, tmp_path / flow.RAFT_FILE)
    video = torch.zeros(3, *size, 3, dtype=torch.uint8)
    video[:, :, : size[1] // 2] = 255
    across, down = flow.raft(tmp_path / flow.RAFT_FILE, CPU).estimate(video[:-1], video[1:])[1, :, 5]
    assert (down == (16.0 if size[0] > 128 else 4.0)).all()
    torch.testing.assert_close(across, torch.arange(size[1]).float(), atol=0.5, rtol=0)


def test_a_block_at_the_border_is_the_mean_over_what_there_is_of_it():
    averaging = flow._averaging(20)
    assert averaging[0].tolist() == pytest.approx([1 / 5] * 5 + [0] * 15)
    assert averaging[10].tolist() == pytest.approx([0] * 6 + [1 / 9] * 9 + [0] * 5)


def test_a_raft_file_that_was_cut_short_is_a_skip_and_no_silent_other_estimator(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / flow.RAFT_FILE).write_bytes(b"cut short")
    with pytest.raises(MetricSkipped, match="fetch it again"):
        find_flow(CPU)


def test_a_flow_of_one_pixel_in_a_frame_of_twice_the_size_is_half_a_pixel():
    larger = torch.stack([torch.full((8, 12), 4.0), torch.full((8, 12), 2.0)])[None]
    halved = flow._resized_flow(larger, (4, 4))
    assert halved.shape == (1, 2, 4, 4)
    torch.testing.assert_close(halved[0, :, 0, 0], torch.tensor([4.0 / 3, 1.0]))


def test_raft_computes_without_tf32_as_every_other_network_does(tmp_path, monkeypatch):
    class Still(torch.nn.Module):
        def load_state_dict(self, _):
            pass

        def forward(self, before, after, num_flow_updates):
            seen.append(torch.backends.cudnn.allow_tf32)
            return [torch.zeros(len(before), 2, *before.shape[-2:])]

    seen: list[bool] = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr("torchvision.models.optical_flow.raft_large", lambda weights: Still())
    torch.save({}, tmp_path / flow.RAFT_FILE)
    frames = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    flow.raft(tmp_path / flow.RAFT_FILE, CPU).estimate(frames, frames)
    assert seen == [False] and torch.backends.cudnn.allow_tf32
