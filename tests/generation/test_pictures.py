"""What is saved of samples can be read back: grids, animations, and the samples themselves."""

from __future__ import annotations

import numpy as np
import torch
from old_samples import save_samples
from PIL import Image

from ditbench.harness.generation.generate import load_samples, save_animation, save_grid
from ditbench.harness.samples.samples import Prompt, Samples

FRAMES, SIDE = 6, 8


def videos(n: int, fps: float = 8.0) -> Samples:
    """Every frame one grey of its own: 40 per video and 6 per frame."""
    grey = 40 * torch.arange(n)[:, None] + 6 * torch.arange(FRAMES)
    pixels = grey[:, :, None, None, None].expand(n, FRAMES, SIDE, SIDE, 3).to(torch.uint8).contiguous()
    return Samples(pixels, prompts=tuple(Prompt(f"video {i}", {"tag": "motion"}) for i in range(n)), fps=fps)


def test_a_grid_of_videos_has_one_video_a_row_and_its_frames_in_order(tmp_path):
    save_grid(videos(5), tmp_path / "grid.png", columns=3, rows=4, cell=16)
    with Image.open(tmp_path / "grid.png") as image:
        grid = np.asarray(image)
    assert grid.shape == (4 * 16, 3 * 16, 3), "small frames are enlarged to a cell"
    shown = grid[8::16, 8::16, 0]
    assert shown.tolist() == [[40 * row + 6 * frame for frame in (0, 2, 5)] for row in range(4)]


def test_a_grid_of_images_is_filled_row_by_row(tmp_path):
    images = Samples(videos(5).pixels[:, 0])
    save_grid(images, tmp_path / "grid.png", columns=2, rows=2, cell=8)
    with Image.open(tmp_path / "grid.png") as image:
        assert np.asarray(image)[4::8, 4::8, 0].tolist() == [[0, 40], [80, 120]]


def test_an_animation_shows_every_frame_side_by_side_at_the_videos_speed(tmp_path):
    save_animation(videos(3, fps=10.0), tmp_path / "a.gif", columns=2, rows=2, cell=8)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == FRAMES and image.info["loop"] == 0 and image.size == (16, 16)
        for frame in range(FRAMES):
            image.seek(frame)
            assert image.info["duration"] == 100
            shown = np.asarray(image.convert("RGB"))[4::8, 4::8, 0]
            np.testing.assert_allclose(shown, [[6 * frame, 40 + 6 * frame], [80 + 6 * frame, 0]], atol=1)


def test_saved_videos_are_read_back_with_their_prompts_and_speed(tmp_path):
    save_samples(videos(2, fps=12.5), tmp_path / "images.npz")
    found = load_samples(tmp_path / "images.npz")
    assert torch.equal(found.pixels, videos(2).pixels) and found.is_video
    assert found.prompts == videos(2).prompts and found.fps == 12.5 and found.labels_N is None
