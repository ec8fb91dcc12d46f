"""The registry of others' data; `fetch` is tried on file: addresses and on a network that is not there."""

import hashlib
import re
import socket
from urllib.error import HTTPError, URLError

import pytest
import torch

from ditbench.eval import clip_h14, data, fetch, hpsv2, mlperf, pick_score
from ditbench.eval.clip import HUB as CLIP_HUB
from ditbench.eval.data import Data, find_data, known_data, verify
from ditbench.eval.dino_similarity import DINOV2
from ditbench.eval.flow import RAFT_URL
from ditbench.eval.geneval_detector import DETECTOR
from ditbench.eval.image_reward import HUB as REWARD_HUB
from ditbench.eval.inception import clean_fid_upstream, torch_fidelity_upstream
from ditbench.eval.lpips import SMALLEST as LPIPS_BACKBONES
from ditbench.eval.lpips import backbone_upstream
from ditbench.eval.reference import load_reference, write_reference
from ditbench.eval.vbench_style import AESTHETIC_FILE
from ditbench.eval.video_judges import DINO
from ditbench.eval.weights import local_weights
from ditbench.harness.common.errors import UserError

CONTENT = b"what others publish"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DITBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("DITBENCH_WEIGHTS")
    return tmp_path / "data"


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setenv("DITBENCH_OFFLINE", "0")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def published(tmp_path, **fields) -> Data:
    site = tmp_path / "site" / "file.bin"
    site.parent.mkdir(exist_ok=True)
    site.write_bytes(CONTENT)
    return Data("thing", "prompts", "a thing", "MIT", url=site.as_uri(), **fields)


def put(entry: Data, content: bytes = CONTENT) -> None:
    entry.path.parent.mkdir(parents=True, exist_ok=True)
    entry.path.write_bytes(content)


def test_every_entry_has_a_kind_a_licence_an_address_and_no_two_share_a_file():
    entries = known_data().values()
    assert {entry.kind for entry in entries} == set(data.KINDS)
    assert all(entry.what and entry.licence and entry.address.startswith("https://") for entry in entries)
    paths = [entry.path for entry in entries if entry.url]
    assert len(set(paths)) == len(paths)


def test_hashes_and_sizes_are_numbers_of_the_right_form_or_absent():
    for entry in known_data().values():
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert entry.sha256_prefix is None or f"-{entry.sha256_prefix}." in entry.url
        assert entry.size_bytes is None or entry.size_bytes > 0


def test_addresses_are_those_that_the_libraries_use():
    assert find_data("inception-fid").url == torch_fidelity_upstream().url
    assert find_data("inception-clean-fid").url == clean_fid_upstream().url
    for backbone in LPIPS_BACKBONES:
        assert find_data(f"lpips-{backbone}").url == backbone_upstream(backbone).url
    assert {find_data(f"clip-{name.replace('_', '-')}").repo for name in CLIP_HUB} == set(CLIP_HUB.values())
    assert find_data("image-reward").repo == REWARD_HUB
    assert find_data("pick-score").repo == pick_score.HUB and find_data("dinov2-base").repo == DINOV2
    assert find_data("hpsv2.1").repo == hpsv2.HUB and find_data("hpsv2.1").files == (hpsv2.FILE,)
    assert find_data("clip-h14").repo == clip_h14.NAME and find_data("clip-h14").files == clip_h14.TOKENIZER_FILES
    assert find_data(mlperf.MOMENTS).path.name == mlperf.MOMENTS_FILE
    assert find_data("raft-large").url == RAFT_URL
    assert find_data("dino-b16").repo == DINO and find_data("mask2former-coco").repo == DETECTOR
    assert find_data("laion-aesthetic").path.name == AESTHETIC_FILE


def test_weights_are_listed_only_if_a_metric_reads_them():
    read = {"inception-fid", "inception-clean-fid", "lpips-alex", "lpips-vgg", "clip-b32", "clip-l14", "clip-l14-336"}
    read |= {"mask2former-coco", "i3d-kinetics400", "image-reward", "raft-large", "dino-b16", "laion-aesthetic"}
    read |= {"pick-score", "hpsv2.1", "clip-h14", "dinov2-base", mlperf.MOMENTS}
    assert set(data.names_of(data.WEIGHTS)) == read, "see the test above: what is fetched has to be what is looked for"


def test_an_entry_needs_one_address_and_a_known_kind():
    for fields in ({}, {"url": "https://a", "repo": "b"}, {"repo": "b"}):
        with pytest.raises(ValueError, match="needs a kind"):
            Data("x", "weights", "x", "MIT", **fields)
    with pytest.raises(ValueError, match="needs a kind"):
        Data("x", "models", "x", "MIT", url="https://a")


def test_a_fetched_file_lies_below_the_folder_of_its_kind(online, tmp_path, folder):
    entry = published(tmp_path)
    said = fetch.fetch(entry)
    assert entry.path == folder / "prompts" / "file.bin" and entry.path.read_bytes() == CONTENT
    assert str(entry.path) in said and SHA256 in said
    assert [file.name for file in entry.path.parent.iterdir()] == ["file.bin"]


def test_what_is_here_is_not_fetched_again(online, tmp_path):
    entry = published(tmp_path)
    put(entry, b"mine")
    assert "already here" in fetch.fetch(entry) and entry.path.read_bytes() == b"mine"


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"sha256_prefix": "01234567"}, {"size_bytes": 3}])
def test_a_file_other_than_published_is_not_kept_and_not_called_good(wrong, online, tmp_path, folder):
    entry = published(tmp_path, **wrong)
    with pytest.raises(UserError, match="nothing was kept"):
        fetch.fetch(entry)
    assert not [file for file in folder.rglob("*") if file.is_file()]
    put(entry)
    assert verify(entry).ok is False and "delete" in verify(entry).says
    with pytest.raises(UserError, match="fetch it again"):
        fetch.fetch(entry)


@pytest.mark.parametrize("right", [{"sha256": SHA256}, {"sha256_prefix": SHA256[:8]}, {"size_bytes": len(CONTENT)}])
def test_a_file_as_published_is_kept_and_verified(right, online, tmp_path):
    entry = published(tmp_path, **right)
    fetch.fetch(entry)
    assert verify(entry).ok is True


def test_without_a_published_hash_verify_prints_yours(tmp_path):
    entry = published(tmp_path)
    assert verify(entry).ok is None and "`ditbench data fetch thing`" in verify(entry).says
    put(entry)
    assert verify(entry).ok is True and f"no published hash; yours is {SHA256}" in verify(entry).says


@pytest.mark.parametrize(
    "failure", [URLError(socket.gaierror(-3, "Temporary failure in name resolution")), TimeoutError("timed out")]
)
def test_without_a_network_it_says_so_in_two_lines_with_the_command_to_do_it_by_hand(
    failure, online, monkeypatch, tmp_path, folder
):
    def urlopen(*_, **__):
        raise failure

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(UserError) as caught:
        fetch.fetch(find_data("geneval"))
    first, second = str(caught.value).splitlines()
    assert first.startswith("geneval: no network (") and ("Temporary failure" in first or "timed out" in first)
    entry = find_data("geneval")
    assert second.endswith(f"curl -L --create-dirs -o {entry.path} {entry.url}")
    assert not folder.exists() or not list(folder.rglob("*"))


def test_an_address_that_is_gone_is_told_from_a_missing_network(online, monkeypatch):
    def urlopen(url, **_):
        raise HTTPError(url, 404, "Not Found", None, None)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(UserError, match="answered 404 Not Found"):
        fetch.fetch(find_data("sdci"))


def test_a_hub_model_without_a_network_names_the_hubs_own_command(online, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(repo, **_):
        raise LocalEntryNotFoundError("Cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(Data, "is_here", False)
    with pytest.raises(UserError, match="no network .*\n.*hf download openai/clip-vit-large-patch14$"):
        fetch.fetch(find_data("clip-l14"))


def test_of_a_repository_that_holds_more_only_what_is_read_is_fetched(online, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **how: asked.update({repo: how["allow_patterns"]})
    )
    monkeypatch.setattr(Data, "is_here", False)
    for name in ("hpsv2.1", "pick-score"):
        fetch.fetch(find_data(name))
    assert asked == {hpsv2.HUB: [hpsv2.FILE], pick_score.HUB: None}
    assert find_data("hpsv2.1").by_hand == f"hf download {hpsv2.HUB} {hpsv2.FILE}"
    for entry in known_data().values():
        assert not entry.only or set(entry.files) & set(entry.only), "what it is known by is among what is fetched"


def test_with_downloads_switched_off_nothing_is_asked(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(UserError, match="downloads are switched off"):
        fetch.fetch(find_data("geneval"))


def test_fetched_weights_are_where_the_metrics_look_for_them(folder):
    entry = find_data("lpips-alex")
    assert entry.path.parent == folder / "weights"
    put(entry)
    with pytest.raises(
        Exception, match="expected a SHA-256 beginning 7be5be79"
    ):  # found, and not taken for the real one
        local_weights(backbone_upstream("alex"))


def test_a_fetched_reference_batch_is_known_by_its_name():
    with pytest.raises(UserError, match="`ditbench data fetch adm-imagenet256`"):
        load_reference("adm-imagenet256")
    images = torch.arange(96, dtype=torch.uint8).reshape(2, 4, 4, 3)
    write_reference(images, find_data("adm-imagenet256").path)
    assert torch.equal(load_reference("adm-imagenet256").images_NHWC[:], images)
