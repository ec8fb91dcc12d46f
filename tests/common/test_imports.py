"""Imports while Python's collector waits."""

from __future__ import annotations

import gc
import logging

import pytest

from ditbench.harness.common.imports import OF_OTHERS, Without, importing, leave_out_warnings_of_others


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


def test_of_the_warnings_of_neighbours_those_that_no_run_needs_are_left_out(caplog):
    leave_out_warnings_of_others()
    leave_out_warnings_of_others()
    for name, words in OF_OTHERS.items():
        logging.getLogger(name).warning("%s: it is so", words)
        logging.getLogger(name).warning("another matter")
    assert [record.getMessage() for record in caplog.records] == ["another matter"] * len(OF_OTHERS)
    filters = [each for name in OF_OTHERS for each in logging.getLogger(name).filters if isinstance(each, Without)]
    assert len(filters) == len(OF_OTHERS)
