"""Files take their names at once; what is no file is left as it is."""

from __future__ import annotations

import os
import sys

import pytest

from ditbench.harness.common import watch
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import atomic_path


def test_a_pipe_or_device_of_that_name_is_refused_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="came a device or a pipe"), atomic_path(tmp_path / "pipe") as part:
        part.write_text("x")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "there").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with atomic_path(tmp_path / "link") as part:
        part.write_text("after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "after"


def test_a_standard_error_that_cannot_be_written_costs_only_the_line(monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = write

    monkeypatch.setattr(sys, "stderr", Full())
    watch.say("a line")
