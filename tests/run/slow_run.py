"""`python tests/run/slow_run.py SECONDS OVERRIDE…`: `ditbench run`, with so long a rest after each piece of samples, and a tracker
that hears of it often: a run of seconds that can be looked at and killed while it goes on.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from ditbench.harness.cli import main
from ditbench.harness.generation import generate
from ditbench.harness.records import tracking
from ditbench.harness.records.trackers import wandb

rest_s, arguments = float(sys.argv[1]), sys.argv[2:]
draw_piece = generate._draw_piece


def draw_slowly(*what: Any) -> bool:
    ours = draw_piece(*what)
    time.sleep(rest_s)
    return ours


generate._draw_piece = draw_slowly
tracking.EVERY_S = 0.2
wandb.SETTINGS |= {"x_transaction_log_flush_interval": 0.2, "x_stats_sampling_interval": 0.5}
sys.exit(main(["run", *arguments]))
