"""What the Layers tab calls a layer's format."""

from __future__ import annotations

from ditbench.harness.report import layers


def test_a_layer_is_called_by_its_format_and_not_by_its_widths(add_run):
    record = add_run("a", "W8A8")
    cell = {"sqnr_db": 30.0, "backend": "simulate", "weight_bits": 8, "act_bits": 8}
    assert layers.label_of(record, cell) == "W8A8"
    assert layers.label_of(record, cell | {"label": "FP8"}) == "FP8"
    record.layers = {"proj": cell | {"label": "FP8"}}
    assert layers.worst(record) == [["proj", "30.0 dB", "FP8", "simulate"]]


def test_records_of_before_labels_were_written_down_are_read_by_their_run(add_run):
    record = add_run("a", "W8A8")
    record.bits = record.bits | {"label": "FP8"}
    assert layers.label_of(record, {"weight_bits": 8, "act_bits": 8}) == "FP8"
    assert layers.label_of(record, {"weight_bits": 8, "act_bits": 16}) == "W8A16", "left in float on one side"
