import hashlib

import pytest

from ditbench.eval import weights
from ditbench.eval.base import MetricSkipped, evaluate, known_metrics
from ditbench.eval.needs import lacking

FILE = "inception-0123abcd.pth"


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


def test_no_metric_asks_the_network_for_weights_that_can_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("DITBENCH_OFFLINE", "0")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    source = file_with_honest_name(tmp_path / "site")  # an address that would answer
    with pytest.raises(MetricSkipped, match="not here; `ditbench data fetch inception-fid`, or put inception-"):
        weights.find_weights(
            upstream(tmp_path, source.as_uri()), lambda: "they are not here; `ditbench data fetch inception-fid`"
        )
    assert not weights.weights_folder().exists()


def test_skipped_inception_metrics_say_what_doctor_says(evidence, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (entry,) = evaluate(["torchmetrics/fid"], evidence).values()
    (announced,) = lacking(known_metrics()["torchmetrics/fid"])
    assert entry["status"] == "skipped" and entry["reason"].startswith(announced)
