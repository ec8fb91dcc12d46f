"""What makes a model the model it is, known from its files without loading it: a hash for each part that would be loaded.

Of a pipeline's folder: its index, and of each part that the index names its configuration, weights (of the variant that would
be taken), vocabularies and templates. A README, weights of other variants, pickled twins of safetensors, hidden files,
file times and the place of the folder are in no hash. Random weights are known by what they are drawn from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from ditbench.harness.common.code_identity import package_version
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.file_hashes import files_sha256
from ditbench.harness.common.files import canonical_sha256
from ditbench.harness.models.checkpoint import (
    CONFIG,
    FILE,
    FOLDER,
    INDEX,
    SUFFIX,
    TRANSFORMER,
    Checkpoint,
    Place,
    model_folder,
)
from ditbench.harness.models.checkpoint_files import WEIGHTS

TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # configurations, vocabularies, chat templates
SHARDS = ".index.json"  # says in which file a weight lies
DRAWN_BY = ("torch", "diffusers")  # another version may draw other weights from the same seed


def parts_of_random(family: str, arguments: Mapping[str, Any], seed: int) -> dict[str, str]:
    """What random weights are drawn from."""
    drawn_by = {name: package_version(name) for name in DRAWN_BY}
    return {"random": canonical_sha256([family, dict(arguments), seed, drawn_by])}


def parts_of(checkpoint: Checkpoint, folders: Mapping[str, Path] | None = None) -> dict[str, str]:
    """{part: SHA-256 of all that is loaded of it}.

    folders: of a family whose parts do not lie in one pipeline's folder, where each is.

    Raises:
        UserError: a part is on the hub, and not in its cache here.
    """
    if folders is not None:
        return {name: _folder_sha256(folder, loaded_files(folder, None)) for name, folder in folders.items()}
    base = local_folder(checkpoint.base, INDEX, checkpoint.revision)
    index = read_config(base / INDEX)
    found = {INDEX: _config_sha256(base / INDEX)}
    for name in named_parts(index):
        if (base / name).is_dir() and not (name == TRANSFORMER and checkpoint.transformer):
            files = loaded_files(base / name, checkpoint.variant)
            if checkpoint.source.kind == FILE and index[name][0] != "transformers":
                files = [path for path in files if not WEIGHTS.fullmatch(path.name)]  # they are in the one file
            found[name] = _folder_sha256(base / name, files)
    if checkpoint.source.kind == FILE:
        found["file"] = _file_sha256(Path(checkpoint.source.where))
    if checkpoint.transformer is not None:
        found[TRANSFORMER] = _transformer_sha256(checkpoint, checkpoint.transformer, base)
    return found


def parts_of_adapters(files: list[Path]) -> dict[str, str]:
    return {f"lora.{index}": sha256 for index, sha256 in enumerate(map(_file_sha256, files))}


def named_parts(index: Mapping[str, Any]) -> list[str]:
    """Of a pipeline's index the parts that it has: [library, class] each."""
    pairs = ((name, of) for name, of in index.items() if not name.startswith("_"))
    return [name for name, of in pairs if isinstance(of, list) and len(of) == 2 and all(isinstance(x, str) for x in of)]


def loaded_files(part: Path, variant: str | None) -> list[Path]:
    """The files in a part's folder that a library reads when it loads the part.

    Weights are those of the variant where there are any, in safetensors where there are any.
    """
    texts, weights = [], []
    for path in sorted(path for path in part.iterdir() if path.is_file() and not path.name.startswith(".")):
        if WEIGHTS.fullmatch(path.name):
            weights.append(path)
        elif path.suffix in TEXTS and not path.name.endswith(SHARDS) and not path.stem.isupper():  # LICENSE.txt
            texts.append(path)
    wanted = variant if variant and any(_variant(path) == variant for path in weights) else ""
    weights = [path for path in weights if _variant(path) == wanted]
    return texts + ([path for path in weights if path.suffix == SUFFIX] or weights)


def local_folder(place: Place, file: str, revision: str | None) -> Path:
    """Where a folder is on this machine, by a file in it; of a hub id, its place in the hub's cache.

    Raises:
        UserError: it is not here.
    """
    if place.kind == FOLDER:
        return Path(place.where)
    found = try_to_load_from_cache(place.where, file, revision=revision)
    if not isinstance(found, str):
        raise UserError(f"{place.where} is not on this machine; its identity is known once it is downloaded")
    return Path(found).parents[file.count("/")]


def read_config(path: Path) -> dict[str, Any]:
    """Raises UserError: unreadable."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got a {type(values).__name__}")
    return values


def _transformer_sha256(checkpoint: Checkpoint, place: Place, base: Path) -> str:
    """Of one that takes the place of the pipeline's own."""
    if place.kind == FILE:  # its configuration is the pipeline's
        config = base / TRANSFORMER / CONFIG
        return canonical_sha256([_config_sha256(config) if config.exists() else None, _file_sha256(Path(place.where))])
    folder = model_folder(transformer_folder(place))
    return _folder_sha256(folder, loaded_files(folder, checkpoint.variant))


def transformer_folder(place: Place) -> Path:
    """Of a folder or hub id: the transformer's, or the whole pipeline's. Raises UserError: it is not here."""
    try:
        return local_folder(place, CONFIG, None)
    except UserError:
        return local_folder(place, f"{TRANSFORMER}/{CONFIG}", None)


def _folder_sha256(folder: Path, files: list[Path]) -> str:
    configs = [path for path in files if path.name.endswith(("config.json", INDEX))]
    hashes = files_sha256([path for path in files if path not in configs])
    named = {_without_variant(path): sha256 for path, sha256 in hashes.items()}
    return canonical_sha256(named | {path.name: _config_sha256(path) for path in configs})


def _config_sha256(path: Path) -> str:
    """Without the place that its library notes it was loaded from."""
    values = {name: value for name, value in read_config(path).items() if name != "_name_or_path"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()  # which may hold an infinity


def _file_sha256(path: Path) -> str:
    return files_sha256([path])[path]


def _variant(path: Path) -> str:
    match = WEIGHTS.fullmatch(path.name)
    return (match[1] or "") if match else ""


def _without_variant(path: Path) -> str:
    return path.name.replace(f".{variant}", "", 1) if (variant := _variant(path)) else path.name
