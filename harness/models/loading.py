"""How a model is loaded: its family by name, its weights from the zoo, a folder or the hub, and what is said when it cannot be."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.models.base import Adapter, LoadedModel, ModelSpec
from ditbench.harness.models.zoo import WEIGHTS


def family(name: str) -> Adapter:
    import ditbench.harness.models.families as package

    families = {m.name for m in pkgutil.iter_modules(package.__path__)}
    if name not in families:
        raise unknown_name("model family", name, families)
    module = importlib.import_module(f"ditbench.harness.models.families.{name}")
    return getattr(module, "FAMILY", module)  # type: ignore[return-value]


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load (or draw) a model, check its weights, apply the stress rescaling if asked for.

    Raises:
        UserError: no such weights, unreadable or truncated weights, another architecture, NaN in the weights.
    """
    quiet_libraries()
    adapter = family(spec.family)
    if spec.size:
        if not is_dataclass(adapter):
            raise UserError(f"model {spec.name}: family {spec.family} draws one size; leave model.size out")
        adapter = replace(adapter, size=spec.size)
    dtype = getattr(torch, spec.dtype)
    extras: dict[str, Path] = {}
    if spec.random is not None:
        with _private_seed(spec.seed):
            pipe = adapter.random_pipeline(dict(spec.random), dtype)
    else:
        folder = _source_folder(spec, getattr(adapter, "INDEX", "model_index.json"))
        pipe = _load_pipeline(adapter, spec, folder, dtype)
        if (Path(folder) / "judge").is_dir():
            extras["judge"] = Path(folder) / "judge"
    pipe.transformer.eval().requires_grad_(False)
    for part in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        for name, tensor in part.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise UserError(
                    f"model {spec.name}: NaN or infinity in {name}; the checkpoint is damaged, fetch it again"
                )
    model = LoadedModel(spec, pipe, adapter, extras)
    if spec.stress:
        model.inject_outliers(**spec.stress)
    return model


def quiet_libraries() -> None:
    """No progress bars of diffusers and transformers among ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _source_folder(spec: ModelSpec, index: str) -> str:
    assert spec.source is not None, "a model has a source or random weights"
    if spec.source.startswith("zoo:"):
        folder = WEIGHTS / spec.source.removeprefix("zoo:")
        if not (folder / "model_index.json").exists():
            raise UserError(f"model {spec.name}: {folder} is missing; make it with `ditbench zoo train {folder.name}`")
        return str(folder)
    local = Path(spec.source).expanduser()
    if local.is_dir():
        if not (local / index).exists():
            raise UserError(f"model {spec.name}: {local} is no diffusers pipeline folder (no {index} in it)")
        return str(local)
    if local.is_absolute() or spec.source.startswith((".", "~")):
        raise UserError(f"model {spec.name}: no folder {local}; set model.source to a diffusers pipeline folder")
    if spec.source.count("/") != 1:
        raise UserError(f"model {spec.name}: no folder {local}, and a hub id has the form owner/name")
    return spec.source


def _load_pipeline(adapter: Adapter, spec: ModelSpec, folder: str, dtype: torch.dtype) -> Any:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from safetensors import SafetensorError

    where = f"model {spec.name} ({folder})"
    try:
        return adapter.load(folder, spec.revision, dtype)
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise _missing_weights(spec) from error
    except (OSError, SafetensorError) as error:
        unreadable = next((each for each in _with_causes(error) if isinstance(each, SafetensorError)), None)
        if unreadable is not None:  # diffusers says OSError, "Unable to load weights", and where, but not why
            raise UserError(
                f"{where}: weights cannot be read ({unreadable}); the file is corrupt or truncated, fetch it again: "
                f"{_first_line(error)}"
            ) from error
        if not Path(folder).is_dir():
            raise _missing_weights(spec) from error
        raise UserError(f"{where}: {_first_line(error)}") from error
    except (ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"{where}: not a checkpoint of family {spec.family!r}: {_first_line(error)}; choose the matching model="
        ) from error


def _missing_weights(spec: ModelSpec) -> UserError:
    folder = f"./weights/{str(spec.source).rsplit('/', 1)[-1]}"
    return UserError(
        f"model {spec.name}: {spec.source} is no folder here, and cannot be downloaded from the hub now.\n"
        f"Where there is a network: `hf download {spec.source} --local-dir {folder}`; then add model.source={folder}"
    )


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


class _private_seed:
    """Seeds torch inside the block and gives the global random state back after it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self.state)
