"""Imports while Python's collector waits."""

from __future__ import annotations

import gc

import pytest

from ditbench.harness.common.imports import importing


def test_the_collector_waits_for_imports_and_goes_on_after_them_even_if_one_fails():
    with pytest.raises(ImportError), importing():
        assert not gc.isenabled()
        raise ImportError("no such package")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
