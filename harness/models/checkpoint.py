"""Where a model's weights are (a folder, one file, the hub), what is seen of them before anything is loaded, and how they are loaded.

Diffusers loads; this file finds what it is given, in the forms in which people have checkpoints, and refuses in a line what would
otherwise be a traceback, a silent download or a model that is not what its files say. docs/checkpoints.md has the table of forms.

Functions import diffusers and transformers themselves: that takes seconds, which a command that loads no model need not wait.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import nn

from ditbench.harness.common.errors import UserError, first_words
from ditbench.harness.models.checkpoint_files import (
    CONFIG,
    INDEX,
    OLD_NAMES,
    SUFFIX,
    TRANSFORMER,
    check_part,
    check_pipeline_folder,
    check_weights,
    variants,
)

FOLDER, FILE, HUB = "folder", "file", "hub"
WEIGHT_FILE = "diffusion_pytorch_model.safetensors"  # of a diffusers model that is one file
LACKS = "meta tensor"  # what diffusers says of a file that leaves some of its model's weights without a value
SUFFIXES = (SUFFIX, ".gguf", ".ckpt", ".pt", ".pth", ".bin")  # no hub id ends so


class AnotherFamily(TypeError):
    """A pipeline that could be loaded, and is none that the family knows: another model= is wanted."""


@dataclass(frozen=True)
class Place:
    """kind: FOLDER or FILE, which are here, or HUB. where: its path, or the hub id."""

    kind: str
    where: str

    @property
    def local(self) -> bool:
        return self.kind != HUB


def locate(value: str, option: str, wanted: str) -> Place:
    """What an option such as model.source names; what looks like a path is never taken for a hub id.

    wanted: what a folder should be, in words, for errors.

    Raises:
        UserError: nothing there, a file that is no .safetensors, or neither a path nor a hub id.
    """
    path = Path(value).expanduser()
    if path.is_dir():
        return Place(FOLDER, str(path))
    if path.suffix == ".gguf":
        raise UserError(f"{path} holds quantized weights (gguf); ditbench quantizes float weights, give it those")
    if path.suffix in SUFFIXES and path.suffix != SUFFIX:
        raise UserError(f"{path}: single files are read as {SUFFIX} only, nothing is unpickled; convert it first")
    if path.is_file() and path.suffix == SUFFIX:
        return Place(FILE, str(path))
    if path.suffix == SUFFIX:
        raise UserError(f"no file {path}; set {option} to {wanted}")
    if path.is_absolute() or value.startswith((".", "~")):
        raise UserError(f"no folder {path}; set {option} to {wanted}")
    if value.count("/") != 1:
        raise UserError(f"no folder {path}, and a hub id has the form owner/name")
    if path.parent.is_dir():
        raise UserError(
            f"no folder {path}; {option} is taken for a path and for no hub id, since {path.parent} is here"
        )
    return Place(HUB, value)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one model, found but not loaded.

    source: of the pipeline. revision, variant: of its files. config: for a source that is one file, the pipeline (folder or
    hub id) that it belongs to. transformer: what takes the place of the pipeline's own, if anything.
    """

    source: Place
    dtype: torch.dtype
    revision: str | None = None
    variant: str | None = None
    config: Place | None = None
    transformer: Place | None = None

    @property
    def base(self) -> Place:
        """Where the pipeline's index and configurations are."""
        return self.config or self.source

    @property
    def plain(self) -> bool:
        """Whether it is a pipeline's folder or hub id and nothing else."""
        return self.source.kind != FILE and self.transformer is None and self.variant is None

    def check(self) -> None:
        """Look at what is here before the libraries do.

        Raises:
            UserError: what is broken, missing or already quantized; only files of a variant that was not asked for, or none of
                one that was.
        """
        if self.base.kind == FOLDER:
            check_pipeline_folder(Path(self.base.where), self.variant, self._replaced())
        for place in (self.source, self.transformer):
            if place is not None and place.kind == FILE:
                check_weights(Path(place.where))
        if self.transformer is not None and self.transformer.kind == FOLDER:
            check_part(model_folder(Path(self.transformer.where)), self._variant_of(self.transformer))

    def check_cached(self) -> None:
        """The same of what the hub's cache has by now."""
        if folder := self._cached(self.base, INDEX):
            check_pipeline_folder(folder, self.variant, self._replaced(), whole=False)
        for file in (CONFIG, f"{TRANSFORMER}/{CONFIG}"):  # of a transformer's folder, or of a whole pipeline
            if self.transformer is not None and (folder := self._cached(self.transformer, file)):
                check_part(folder, self.variant)

    def _cached(self, place: Place, file: str) -> Path | None:
        """Of a hub id the folder of a file in the cache."""
        revision = self.revision if place == self.base else None
        found = try_to_load_from_cache(place.where, file, revision=revision) if place.kind == HUB else None
        return Path(found).parent if isinstance(found, str) else None

    def _replaced(self) -> set[str]:
        return {TRANSFORMER} if self.transformer or self.source.kind == FILE else set()

    def pipeline(self) -> Any:
        """The diffusers pipeline, by the class that its index names.

        Raises:
            UserError: diffusers cannot read this form of it. Whatever diffusers raises of weights that it cannot read.
        """
        from diffusers import DiffusionPipeline

        parts = {} if self.transformer is None else {TRANSFORMER: self._transformer(self.transformer)}
        if self.base.kind == FOLDER:  # what the index says is not there, diffusers would miss
            parts |= {name: None for name, of in self._index().items() if of == [None, None]}
        if self.source.kind == FILE:
            return self._of_one_file(parts)
        return DiffusionPipeline.from_pretrained(
            self.source.where,
            revision=self.revision,
            variant=self.variant,
            dtype=self.dtype,
            local_files_only=self.source.local,
            **parts,
        )

    def _of_one_file(self, parts: dict[str, Any]) -> Any:
        import diffusers

        name = self._index()["_class_name"]
        kind = getattr(diffusers, name, None)
        if not hasattr(kind, "from_single_file"):
            raise UserError(
                f"diffusers reads no {name} from a single file; for one that holds its transformer, "
                f"set model.source={self.base.where} and model.transformer={self.source.where}"
            )
        parts = self._text_encoders() | parts
        return kind.from_single_file(
            self.source.where, config=self.base.where, dtype=self.dtype, local_files_only=self.base.local, **parts
        )

    def _text_encoders(self) -> dict[str, Any]:
        """Those that the file has not: diffusers looks for them in the file only."""
        import transformers
        from diffusers.loaders.single_file_utils import is_clip_model_in_single_file, is_t5_in_single_file

        with safe_open(self.source.where, framework="pt") as opened:
            keys = set(opened.keys())
        where = {"revision": self.revision, "local_files_only": self.base.local}
        found = {}
        for name, of in self._index().items():
            kind = getattr(transformers, of[1], None) if isinstance(of, list) and of[0] == "transformers" else None
            if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
                continue
            if not is_clip_model_in_single_file(kind, keys) and not ("T5" in of[1] and is_t5_in_single_file(keys)):
                found[name] = kind.from_pretrained(self.base.where, subfolder=name, dtype=self.dtype, **where)
        return found

    def _transformer(self, place: Place) -> nn.Module:
        kind = self._transformer_class()
        if place.kind == FILE:
            try:
                return self._transformer_of_one_file(kind, place.where)
            except (LookupError, ValueError, RuntimeError, AttributeError, TypeError) as error:
                if LACKS in str(error):
                    raise
                raise UserError(
                    f"model.transformer={place.where} cannot be read as a {kind.__name__} ({first_words(error)}); is it of "
                    "another model?"
                ) from error
        folder, inside = place.where, None
        if place.kind == FOLDER:
            folder = str(model_folder(Path(folder)))
        elif not _has_config(kind, folder):
            inside = TRANSFORMER  # of a whole pipeline on the hub
        settings = {"subfolder": inside, "local_files_only": place.local}
        found = kind.load_config(folder, **settings).get("_class_name", kind.__name__)
        if found not in (kind.__name__, *OLD_NAMES):
            raise UserError(f"model.transformer={place.where} is a {found}, the pipeline has a {kind.__name__}")
        return kind.from_pretrained(folder, variant=self._variant_of(place), dtype=self.dtype, **settings)

    def _transformer_of_one_file(self, kind: Any, path: str) -> nn.Module:
        from diffusers.loaders import FromOriginalModelMixin

        where = {"subfolder": TRANSFORMER, "local_files_only": self.base.local}
        if issubclass(kind, FromOriginalModelMixin):
            return kind.from_single_file(
                path, config=self.base.where, config_revision=self.revision, dtype=self.dtype, **where
            )
        with TemporaryDirectory() as folder:  # it has no names but diffusers' own: as if it lay where they lie
            config = kind.load_config(self.base.where, revision=self.revision, **where)
            (Path(folder) / CONFIG).write_text(json.dumps(config))
            (Path(folder) / WEIGHT_FILE).symlink_to(Path(path).resolve())
            return kind.from_pretrained(folder, dtype=self.dtype, local_files_only=True)

    def _index(self) -> dict[str, Any]:
        from diffusers import DiffusionPipeline

        where = {"revision": self.revision, "local_files_only": self.base.local}
        return dict(DiffusionPipeline.load_config(self.base.where, **where))

    def _transformer_class(self) -> Any:
        import diffusers

        named = self._index().get(TRANSFORMER)
        if not named:
            raise UserError(
                f"the pipeline of {self.base.where} has no transformer that model.transformer could replace"
            )
        kind = getattr(diffusers, named[1], None)
        if kind is None:
            raise UserError(
                f"diffusers has no {named[1]}, which {self.base.where} names; model.transformer cannot load it"
            )
        return kind

    def _variant_of(self, place: Place) -> str | None:
        """A transformer folder need not have the pipeline's variant; of the hub it is asked for."""
        if self.variant is None or place.kind == HUB:
            return self.variant
        return self.variant if self.variant in variants(model_folder(Path(place.where))) else None


def _has_config(kind: Any, hub_id: str) -> bool:
    try:
        kind.load_config(hub_id)
    except OSError:
        return False
    return True


def model_folder(folder: Path) -> Path:
    """Of a transformer: the folder itself, or its place in a whole pipeline."""
    for found in (folder, folder / TRANSFORMER):
        if (found / CONFIG).is_file():
            return found
    raise UserError(f"model.transformer={folder} is no folder of a diffusers model (no {CONFIG} in it)")
