"""A sweep as Hydra sees it: the jobs that a command makes, the configuration of each, and the launcher that it names.

Hydra's own way composes every job twice before it runs and does not say which jobs there are; this composes once, and whoever
calls it decides which jobs are carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _get_cls_name, create_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import run_job
from hydra.errors import ConfigCompositionException
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from ditbench.harness.common.paths import CONF
from ditbench.harness.sweep.compose import groups, hydra_errors_explained, search_path, unknown_key

CONFIG = "config"
MODE = "hydra.mode="


@dataclass
class Multirun:
    """What the arguments make. config: of the sweep, Hydra's own section among it, without what is swept, nor what is left to the
    jobs: settings that it lacks, as one of a swept method's, where the default stands.
    """

    context: HydraContext
    config: DictConfig
    left: list[str]

    @property
    def sweeper(self) -> str | None:
        """Who chooses the jobs one after the other (OptunaSweeper, …); None: they are all known."""
        name = _name(self.config.hydra.sweeper)
        return None if name == _path(BasicSweeper) else name.rpartition(".")[2]

    @property
    def here(self) -> bool:
        """Whether jobs run in this process, one after the other."""
        return _name(self.config.hydra.launcher) == _path(BasicLauncher)

    @property
    def hydra_overrides(self) -> list[str]:
        """Those of the command that are Hydra's, such as a launcher's."""
        given = OmegaConf.to_container(self.config.hydra.overrides.hydra)
        return [each for each in given if not each.startswith(MODE)]

    def jobs(self) -> list[list[str]]:
        """The overrides of every job, in Hydra's order."""
        with hydra_errors_explained():
            (batch,) = BasicSweeper.split_arguments(self._overrides(), None)
            return batch

    def check_left(self) -> None:
        """Raise UserError for a setting that was left to the jobs and that some choice of the swept groups lacks. Only for a sweeper
        that chooses its jobs: others' are all composed before the first one starts.
        """
        if not self.left:
            return
        known = groups()
        kept = [each for each in self._overrides() if not each.is_sweep_override() or each.key_or_group in known]
        with hydra_errors_explained():
            (combinations,) = BasicSweeper.split_arguments(kept, None)
        for number, overrides in enumerate(combinations):
            self.composed(number, overrides)

    def _overrides(self) -> list[Override]:
        """Those of the jobs: of an experiment's file and of the command."""
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        listed = [f"{name}={value}" for name, value in (self.config.hydra.sweeper.params or {}).items()]
        given = OmegaConf.to_container(self.config.hydra.overrides.task, resolve=False)
        return parser.parse_overrides([*listed, *given])

    def composed(self, number: int, overrides: Sequence[str]) -> DictConfig:
        """The configuration of one job, with Hydra's section."""
        with hydra_errors_explained(overrides):
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            return config

    def carry_out(self, config: DictConfig, task: TaskFunction) -> Any:
        """One composed job, in this process, as Hydra's own launcher does it → what the task returns."""
        done = run_job(
            hydra_context=self.context,
            config=config,
            task_function=task,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        return done.return_value  # raises what the task raised

    def launch(self, jobs: Sequence[Sequence[str]], task: TaskFunction) -> list[Any]:
        """All these jobs by the launcher of the command, which composes them where they run → what the tasks returned, or an
        exception in its place.
        """
        with hydra_errors_explained():
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=self.context, task_function=task, config=self.config
            )
            most = self.config.hydra.sweeper.get("max_batch_size") or len(jobs)
            returned: list[Any] = []
            for start in range(0, len(jobs), most):
                returned += launcher.launch([list(job) for job in jobs[start : start + most]], initial_job_idx=start)
        return [each._return_value for each in returned]

    def sweep(self, overrides: Sequence[str], task: TaskFunction) -> None:
        """The sweeper of the command does as it likes. overrides: more that every job has."""
        with hydra_errors_explained():
            sweeper = Plugins.instance().instantiate_sweeper(
                hydra_context=self.context, task_function=task, config=self.config
            )
            given = OmegaConf.to_container(self.config.hydra.overrides.task, resolve=False)
            sweeper.sweep([*given, *overrides])


@contextmanager
def multirun(arguments: Sequence[str]) -> Iterator[Multirun | None]:
    """The sweep that the arguments of `ditbench run` make; None if they make one run, or ask Hydra for something else.

    Raises:
        UserError: a choice, override or value that cannot be used.
    """
    asked = get_args_parser().parse_args([*search_path(), *arguments])
    other = asked.cfg or asked.info or asked.help or asked.hydra_help or asked.shell_completion or asked.config_name
    may_be = asked.multirun or any(each.lstrip("+").startswith(("experiment=", MODE)) for each in asked.overrides)
    if other or not may_be:
        yield None
        return
    mode = [f"{MODE}{RunMode.MULTIRUN.name}"] if asked.multirun else []
    hydra = Hydra.create_main_hydra2("ditbench", create_config_search_path(str(CONF)))
    try:
        with hydra_errors_explained():
            config, left = _of_the_sweep(hydra, [*asked.overrides, *mode])
        if config.hydra.mode != RunMode.MULTIRUN:
            yield None
            return
        with hydra_errors_explained():
            callbacks = Callbacks(config)
        with _hydra_config(config):
            callbacks.on_multirun_start(config=config, config_name=CONFIG)
            yield Multirun(HydraContext(hydra.config_loader, callbacks), config, left)
            callbacks.on_multirun_end(config=config, config_name=CONFIG)
    finally:
        GlobalHydra.instance().clear()


def _of_the_sweep(hydra: Hydra, given: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """The configuration of the sweep, and the overrides that it has no setting for. In it the default stands for each swept group, so
    whether a setting is one can be said of the jobs only.
    """
    parsed = OverridesParser.create().parse_overrides(list(given))
    left: list[Override] = []
    while True:
        try:
            kept = [each.input_line for each in parsed if each not in left]
            config = hydra.compose_config(CONFIG, kept, RunMode.MULTIRUN, with_log_configuration=True)
        except ConfigCompositionException as error:
            if not (missing := [each for each in parsed if each not in left and _sets(each, unknown_key(error))]):
                raise
            left += missing
        else:
            config.hydra.overrides.task = [each.input_line for each in parsed if not each.is_hydra_override()]
            return config, [each.input_line for each in left]


def _sets(override: Override, key: str | None) -> bool:
    """Whether it is this setting that the override sets, or one below it."""
    return key is not None and not override.is_hydra_override() and f"{override.key_or_group}.".startswith(f"{key}.")


@contextmanager
def _hydra_config(config: DictConfig) -> Iterator[None]:
    """What ${hydra:…} reads."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def _name(section: Any) -> str:
    return _get_cls_name(section, pop=False)


def _path(kind: Callable) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
