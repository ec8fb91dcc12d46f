import hashlib
import time

import pytest

from ditbench.eval import weights
from ditbench.eval.base import MetricSkipped

FILE = "inception-0123abcd.pth"


@pytest.fixture(autouse=True)
def forget_failures():
    weights._download.cache_clear()


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setenv("DITBENCH_OFFLINE", "0")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def upstream(folder, url=f"https://example.invalid/releases/{FILE}"):
    return weights.Upstream(url, folder / "library")


def file_with_honest_name(folder, content=b"weights"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"inception-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)
    return path


def test_weights_that_are_nowhere_are_skipped_with_file_address_and_folder(tmp_path):
    with pytest.raises(MetricSkipped) as caught:
        weights.find_weights(upstream(tmp_path))
    reason = str(caught.value)
    assert FILE in reason and upstream(tmp_path).url in reason and str(weights.weights_folder()) in reason


@pytest.mark.parametrize("place", ["ours", "library"])
def test_a_file_in_our_folder_or_the_librarys_is_found_with_its_hash(place, tmp_path):
    folder = weights.weights_folder() if place == "ours" else tmp_path / "library"
    path = file_with_honest_name(folder)
    found, sha256 = weights.find_weights(upstream(tmp_path, f"https://example.invalid/{path.name}"))
    assert found == path and sha256 == hashlib.sha256(b"weights").hexdigest()


def test_a_file_whose_hash_is_not_in_its_name_is_not_used(tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / FILE).write_bytes(b"cut short")
    with pytest.raises(MetricSkipped, match="expected a SHA-256 beginning 0123abcd"):
        weights.find_weights(upstream(tmp_path))


def test_weights_are_downloaded_once_into_our_folder(online, tmp_path):
    source = file_with_honest_name(tmp_path / "site")
    found, _ = weights.find_weights(upstream(tmp_path, source.as_uri()))
    assert found == weights.weights_folder() / source.name and found.read_bytes() == b"weights"
    source.unlink()
    assert weights.find_weights(upstream(tmp_path, source.as_uri()))[0] == found


def test_a_failed_download_leaves_no_file_and_says_why(online, tmp_path):
    missing = (tmp_path / FILE).as_uri()
    with pytest.raises(MetricSkipped, match="could not be downloaded"):
        weights.find_weights(upstream(tmp_path, missing))
    assert not list(tmp_path.rglob("*.pth*"))


def test_a_network_that_never_answers_is_given_up_quickly_and_asked_only_once(online, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(weights, "CONNECT_TIMEOUT_S", -0.8)  # the wait is this plus one second
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: asked.append(1) or time.sleep(3))
    start = time.perf_counter()
    for _ in range(3):
        with pytest.raises(MetricSkipped, match="no answer"):
            weights.find_weights(upstream(tmp_path))
    assert time.perf_counter() - start < 1.0 and asked == [1]
