"""The ablation experiments: each row adds parts to the one before it, and every one of its jobs is a valid run."""

from itertools import product

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ditbench.harness.common.paths import CONF
from ditbench.harness.quant.spec import Bits
from ditbench.harness.stages.config import parse
from ditbench.harness.sweep.compose import register

ABLATIONS = sorted(path.stem for path in (CONF / "experiment").glob("*_ablation.yaml"))


@pytest.fixture(scope="module")
def composed():
    register()
    with initialize_config_dir(str(CONF), version_base=None):
        yield lambda name, *jobs: compose("config", [f"experiment={name}", *jobs], return_hydra_config=True)


def jobs_of(config) -> list[tuple[str, ...]]:
    values = [[f"{key}={value}" for value in row.split(",")] for key, row in config.hydra.sweeper.params.items()]
    return list(product(*values))


def parts(row: str) -> set[str]:
    return set() if row == "none" else set(row.split("+"))


def test_the_four_papers_have_one():
    assert ABLATIONS == ["clq_ablation", "htg_ablation", "lrq_dit_ablation", "ptq4dit_ablation"]


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_job_is_a_valid_run_on_the_model_with_outliers(composed, name):
    jobs = jobs_of(composed(name))
    assert 4 <= len(jobs) == len(set(jobs))
    for job in jobs:
        config = composed(name, *job)
        run = parse(
            {key: value for key, value in OmegaConf.to_container(config, resolve=True).items() if key != "hydra"}
        )
        assert (run.method, run.model.name, run.protocol.n) == (
            name.removesuffix("_ablation"),
            "small-dit-outliers",
            500,
        )
        assert isinstance(run.bits, Bits)


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_row_adds_a_part_to_the_one_before(composed, name):
    rows = [parts(row) for row in composed(name).hydra.sweeper.params["method.parts"].split(",")]
    growing = rows[:4]
    assert not growing[0] and all(less < more for less, more in zip(growing, growing[1:], strict=False))
