"""What is kept beside a run in W&B when somebody asks for it."""

from __future__ import annotations

from wandb_files import contents

from ditbench.harness.cli import main
from ditbench.harness.records import tracking


def test_an_export_is_kept_as_an_artifact_of_the_same_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_gave_up", set())
    assert run("tracker=wandb", "tracker.mode=offline") == 0
    (name,) = [path.parent.name for path in tmp_path.glob("runs/default/*/record.json")]
    assert main(["export", name, "--track", "--out", str(tmp_path / "out"), "--results-dir", str(tmp_path)]) == 0
    files = sorted(tmp_path.glob(f"runs/default/wandb/offline-run-*-{name}/run-{name}.wandb"))
    kept = [each for file in files for each in contents(file)["artifacts"] if each[0] == "quantized-model"]
    assert kept == [("quantized-model", f"tiny-dit-rtn-w8a8-{name}", {"quantized.safetensors", "recipe.json"})]
    assert {contents(file)["run_id"] for file in files} == {name}
    assert contents(files[-1])["exit_code"] == 0
