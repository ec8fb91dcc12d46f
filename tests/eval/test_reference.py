import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from ditbench.eval import batches, reference_files
from ditbench.eval.judges import load_judge
from ditbench.eval.reference import images_sha256, load_reference, write_reference
from ditbench.harness.common.errors import UserError
from ditbench.harness.models.zoo import digits
from ditbench.harness.models.zoo import judge as zoo_judge
from ditbench.harness.samples.rows_on_disk import RowsOnDisk


def test_the_digits_reference_is_all_1797_digits_rounded_to_three_equal_uint8_channels():
    reference = load_reference("digits-1797")
    images = reference.images_NHWC
    assert images.shape == (1797, 16, 16, 3) and images.dtype == torch.uint8
    assert (images[..., 0] == images[..., 1]).all() and (images[..., 0] == images[..., 2]).all()
    grey = (digits.load("all").images_N1HW[:, 0].double() + 1) * 127.5
    assert (images[..., 0].double() - grey).abs().max() <= 0.5  # truncation would reach 1
    assert reference.sha256 == hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert load_reference("digits-1797").images_NHWC is images


@pytest.mark.parametrize("nothing", [None, "", "none"])
def test_no_reference_is_none(nothing):
    assert load_reference(nothing) is None


def test_an_npz_and_a_folder_of_the_same_images_are_the_same_reference(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "ref.npz", images)
    (tmp_path / "folder").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{index:03}.png")
    from_npz, from_folder = load_reference(tmp_path / "ref.npz"), load_reference(str(tmp_path / "folder"))
    assert from_npz.sha256 == from_folder.sha256
    for reference in (from_npz, from_folder):
        assert reference.images_NHWC.shape == (3, 5, 4, 3) and reference.images_NHWC.dtype == torch.uint8
        assert (reference.images_NHWC[:].numpy() == images).all()


def test_a_written_batch_is_read_back_and_holds_what_adms_evaluator_opens(tmp_path):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8))
    path = tmp_path / "deeper" / "batch.npz"
    write_reference(images, path)
    assert torch.equal(load_reference(path).images_NHWC[:], images)
    with np.load(path) as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].dtype == np.uint8
    assert [file.name for file in path.parent.iterdir()] == ["batch.npz"]


@pytest.mark.parametrize("images", [torch.zeros(2, 4, 4, 3), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)])
def test_images_that_would_not_be_read_back_are_not_written(images, tmp_path):
    with pytest.raises(ValueError, match="expected uint8 images"):
        write_reference(images, tmp_path / "batch.npz")
    assert not list(tmp_path.iterdir())


def test_a_misspelt_reference_is_answered_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'digits-1797'"):
        load_reference("digits-1979")


@pytest.mark.parametrize("kind", ["folder", "stored", "compressed"])
def test_a_references_images_are_read_as_a_tensors_rows_are_and_none_is_held(kind, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
    path = tmp_path / "ref.npz"
    if kind == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image).save(path / f"{index}.png")
    else:
        save = {"stored": np.savez, "compressed": np.savez_compressed}[kind]
        save(path, first=np.arange(7), arr_0=images)  # the array does not begin where the file does
    rows, whole = reference_files.folder_rows(path) if kind == "folder" else reference_files.npz_rows(path), images
    assert isinstance(rows, RowsOnDisk) and len(rows) == 5 and rows.ndim == 4
    for wanted in (0, -1, slice(1, 4), slice(4, 4), [3, 0], torch.tensor([2, 2]), torch.tensor([1, 0, 0, 1, 0]).bool()):
        expected = torch.from_numpy(whole)[wanted]
        assert torch.equal(rows[wanted], expected), wanted
    assert [len(part) for part in rows.split(2)] == [2, 2, 1]
    assert torch.equal(torch.stack(list(rows)), torch.from_numpy(images))
    monkeypatch.setattr(batches, "BYTES", 2 * batches.READ * 6 * 4 * 3)  # two images at a time
    assert images_sha256(rows) == hashlib.sha256(images.tobytes()).hexdigest()


def broken_references(folder):
    whole = np.zeros((20, 8, 8, 3), np.uint8)
    np.savez(folder / "float.npz", whole.astype(np.float32))
    np.savez(folder / "other_name.npz", images=whole)
    np.savez(folder / "grey.npz", whole[..., 0])
    np.savez(folder / "fortran.npz", np.asfortranarray(whole))
    np.savez(folder / "whole.npz", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:500])
    flipped = bytearray((folder / "whole.npz").read_bytes())
    flipped[600] ^= 0xFF
    (folder / "flipped.npz").write_bytes(flipped)
    (folder / "text.npz").write_text("not an archive")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "no_images").mkdir()
    (folder / "two_sizes").mkdir()
    for side in (8, 9):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(folder / "two_sizes" / f"{side}.png")
    (folder / "bad_image").mkdir()
    (folder / "bad_image" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nrest is missing")


BROKEN = ["fortran.npz", "float.npz", "other_name.npz", "grey.npz", "cut.npz", "flipped.npz", "text.npz", "empty.npz"]
BROKEN += ["no_images", "two_sizes", "bad_image", "not_there.npz"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reference_says_which_path_what_was_expected_and_what_to_do(name, tmp_path):
    broken_references(tmp_path)
    with pytest.raises(UserError) as caught:
        load_reference(tmp_path / name)
    message = str(caught.value)
    assert name.split(".")[0] in message and "expected" in message


def test_a_judge_is_loaded_with_the_hash_of_its_weight_file(tmp_path):
    folder = tmp_path / "tiny-dit" / "judge"
    zoo_judge.save(zoo_judge.Judge(), folder)
    judge = load_judge(folder)
    assert judge.name == "tiny-dit/judge" and judge.width == 64 and not judge.module.training
    assert judge.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert judge.module.features(load_reference("digits-1797").images_NHWC[:2].permute(0, 3, 1, 2)).shape == (2, 64)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_judge_is_a_user_error_with_its_folder(damage, tmp_path):
    zoo_judge.save(zoo_judge.Judge(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.unlink() if damage == "missing" else weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="expected a judge"):
        load_judge(tmp_path)
