"""What is stored for Hydra is copied where it is loaded, and not all of it at every composition."""

from __future__ import annotations

import copy
import pickle

from hydra.core.config_store import ConfigStore

from ditbench.harness.sweep.compose import composed


def test_hundreds_of_stored_nodes_are_not_copied_and_no_composition_changes_one():
    plain = ["model=tiny-dit", "method=smoothquant", "bits=w4a8"]
    (first,) = composed([plain])
    store = ConfigStore.instance()
    assert copy.deepcopy(store) is store and len(store.list("bits")) > 200
    kept = pickle.dumps(store.repo)
    (other,) = composed([[*plain, "method.strength=0.7", "bits.weight.group_size=16", "+bits.weight.odd=1"]])
    assert other["method"]["strength"] == 0.7 and other["bits"]["weight"]["odd"] == 1
    assert pickle.dumps(store.repo) == kept
    assert composed([plain]) == [first]
