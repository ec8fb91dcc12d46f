"""What the harness asks of a model family, and how a model is loaded.

Everything particular to a family (pipeline class, blocks, where a transform can be folded, sampling loop, decoding) is in
its adapter, `harness/models/<family>.py`, found by file name. The rest of the harness sees `LoadedModel` only.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.files import tensors_sha256
from ditbench.harness.models.stress import inject_outliers
from ditbench.harness.models.zoo import WEIGHTS
from ditbench.harness.quant.blocks import BlockCall
from ditbench.harness.quant.target import Site, Target, is_linear_map
from ditbench.harness.samples.conditions import Conditions

OnCall = Callable[[int, dict[str, Any]], None]  # step, arguments of the transformer's call


@dataclass(frozen=True)
class Correction:
    """What a method may change in the sampler's step (PTQD).

    noise(step, guided estimate) → the estimate that is used.
    variance(step, σ² that an ancestral sampler adds, the estimate's weight in its mean) → the σ² that is used.
    """

    noise: Callable[[int, Tensor], Tensor] | None = None
    variance: Callable[[int, Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class ModelSpec:
    """One file of conf/model/.

    source: "zoo:<name>" (shipped), a local pipeline folder, or a hub id "<owner>/<name>" with `revision`.
    random: instead of source, arguments of the family's transformer class; weights are drawn with `seed`.
    size: height, width, num_frames of what is drawn, where it is not the family's usual.
    stress: {channels, log2_factor, seed}: function-preserving rescaling that gives the activations outliers.
    """

    name: str
    family: str
    source: str | None = None
    revision: str | None = None
    random: dict[str, Any] | None = None
    seed: int = 0
    dtype: str = "float32"
    size: dict[str, int] | None = None
    stress: dict[str, Any] | None = None
    note: str = ""


@dataclass(frozen=True)
class Sampler:
    """How images are drawn: the same for every method of one protocol."""

    kind: str  # one of the family's SAMPLERS
    steps: int
    guidance: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"protocol.steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Drawn:
    """latents: (B, …) float32; pixels in [−1, 1], (B, 3, H, W) or (B, F, 3, H, W), float32, or None if not asked for."""

    latents: Tensor
    pixels: Tensor | None


class Adapter(Protocol):
    """One model family: module-level names of harness/models/<family>.py, or those of its FAMILY object."""

    FLOAT_IN_BLOCKS: str  # regex: linears inside the blocks that the default protocol leaves in float
    SAMPLERS: tuple[str, ...]
    CONDITION: str  # LABELS | PROMPTS
    SHARED: tuple[str, ...]  # arguments of the transformer that have no row per sample

    def load(self, folder: str, revision: str | None, dtype: torch.dtype) -> Any: ...

    def random_pipeline(self, arguments: dict[str, Any], dtype: torch.dtype) -> Any: ...

    def blocks(self, transformer: nn.Module) -> list[str]: ...

    def block_call(self, transformer: nn.Module) -> BlockCall: ...

    def sites(self, transformer: nn.Module) -> list[Site]: ...

    def attention(self, transformer: nn.Module) -> list[str]: ...

    def num_classes(self, transformer: nn.Module) -> int: ...

    def sample(
        self,
        pipe: Any,
        transformer: nn.Module,
        conditions: Conditions,
        sampler: Sampler,
        *,
        on_call: OnCall | None = None,
        correct: Correction | None = None,
        decode: bool = True,
    ) -> Drawn: ...

    def step_inputs(self, pipe: Any, batch: int) -> dict[str, Any]: ...


@dataclass
class LoadedModel:
    """A pipeline in float, its adapter, and a hash of its weights."""

    spec: ModelSpec
    pipe: Any
    adapter: Adapter
    extras: dict[str, Path] = field(default_factory=dict)  # files beside the weights: the judge's folder

    @property
    def transformer(self) -> nn.Module:
        return self.pipe.transformer

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all weights: transformer, and VAE and text encoders, if any."""
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        return tensors_sha256({f"{name}.{n}": t for name, part in parts.items() for n, t in part.state_dict().items()})

    def step_inputs(self, batch: int) -> dict[str, Any]:
        """Arguments of one transformer call on `batch` rows; one denoising step with guidance has twice the samples."""
        return self.adapter.step_inputs(self.pipe, batch)

    def inject_outliers(self, channels: int, log2_factor: int, seed: int) -> None:
        """Give the activations outlier channels, in place; the output stays as it is (`harness.models.stress`)."""
        inject_outliers(self.transformer, self.adapter.sites(self.transformer), channels, log2_factor, seed)

    def target(self, scope: str = "blocks", skip: Iterable[str] = (), attention: bool = False) -> Target:
        """What a protocol quantizes.

        scope: "blocks" (linears inside the blocks, without embedders and adaLN) or "all" (every Linear and Conv2d).
        skip: regular expressions of layer names to leave in float.
        """
        if scope not in ("blocks", "all"):
            raise UserError(f"protocol.scope={scope!r}; expected blocks or all")
        blocks = tuple(self.adapter.blocks(self.transformer))
        in_float = re.compile(self.adapter.FLOAT_IN_BLOCKS or "(?!)")
        names = [n for n, m in self.transformer.named_modules() if is_linear_map(m)]
        if scope == "blocks":
            places = [(n, next((f"{b}." for b in blocks if n.startswith(f"{b}.")), None)) for n in names]
            names = [n for n, block in places if block and not in_float.search(n.removeprefix(block))]
        patterns = [re.compile(pattern) for pattern in skip]
        names = [n for n in names if not any(pattern.search(n) for pattern in patterns)]
        if not names:
            raise UserError(
                f"model {self.spec.name}: protocol.scope={scope} and protocol.skip leave no layer to quantize"
            )
        sites = self.adapter.sites(self.transformer)
        known = {consumer for site in sites for consumer in site.consumers}
        sites += [Site(name, (name,)) for name in names if name not in known]
        operands = tuple(self.adapter.attention(self.transformer)) if attention else ()
        if attention and not operands:
            raise UserError(
                f"model {self.spec.name}: attention operands of family {self.spec.family} cannot be quantized; "
                "set protocol.attention=false"
            )
        return Target(
            self.transformer, tuple(names), tuple(sites), operands, blocks, self.adapter.block_call(self.transformer)
        )


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
