"""Numbers of balanced and of random labels are never ranked together: at n = 64 an FID is twice as large with random ones."""

from ditbench.harness.records.record import Record
from ditbench.harness.report import compare


def record(method, labels):
    config = {"protocol": {"name": "default", "n": 64, "labels": labels}, "model": {"name": "tiny-dit"}, "seed": 0}
    return Record(f"{method}-{labels}", "ok", config, method, "tiny-dit", "designs")


def test_runs_of_balanced_and_of_random_labels_are_in_groups_of_their_own():
    records = [record(method, labels) for labels in ("balanced", "random") for method in ("fp", "rtn")]
    groups = compare.groups(records)
    assert [{each.config["protocol"]["labels"] for each in group.records} for group in groups] in (
        [{"balanced"}, {"random"}],
        [{"random"}, {"balanced"}],
    )
    assert len({group.label for group in groups}) == 2
