"""What a pipeline's `encode_prompt` gives, once per distinct prompt, kept in the cache.

    <cache>/prompts/<key>/encoded.safetensors   of one prompt under one pipeline's settings; on the CPU
    <cache>/prompts/<key>/tree.json             how these tensors are nested

Prompts are encoded one by one, so that an embedding does not depend on its neighbours, wherever the pipeline allows it: where what
it gives for two prompts of different length is, row by row, what it gives for each alone. That is tried once per pipeline and
settings. Pipelines that pad to the longest prompt of a call, or give a list with a tensor per prompt, have whole calls kept as
they are made.

A pipeline asks for prompts only as it goes. Whoever knows all prompts of a run says so (`keeping`): the first that is missing is
then encoded together with all others that are, while the text encoders stay on the device, if they fit there side by side.
"""

from __future__ import annotations

import functools
import inspect
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten, treespec_dumps, treespec_loads

from ditbench.harness.common.artifacts import Address, obtain
from ditbench.harness.common.code_identity import package_version
from ditbench.harness.common.files import canonical_sha256, file_sha256, tensors_sha256
from ditbench.harness.common.memory import free_memory
from ditbench.harness.common.placement import bytes_of, placed_on
from ditbench.harness.common.progress import progress
from ditbench.harness.common.tensor_files import save_tensors
from ditbench.harness.models.calls import PLAIN

KIND = "prompts"
TENSORS, TREE = "encoded.safetensors", "tree.json"
KEPT_BYTES = 2 * 2**30  # in memory, where there is no cache; what does not fit is encoded again
PAIR = ("a red circle", "a small green square above a large blue triangle, drawn by hand on white paper")
CLOSE = {2: 2e-2, 4: 1e-4, 8: 1e-4}  # by bytes of a number: a row encoded alone against the same beside another
ROOM = 0.8  # of free memory that encoders may fill
READ_NOTHING = ("transformer", "vae", "scheduler", "image_encoder", "feature_extractor", "safety_checker", "guider")
KEEPS_PROMPTS = "keeps_prompts"  # False on a pipeline whose embeddings take more room than it takes time to make them
PACKAGES = ("torch", "transformers", "diffusers", "tokenizers")

Arguments = dict[str, Any]
Encode = Callable[..., Any]


@dataclass
class Shelf:
    """What is kept for one pipeline. texts: all prompts of the run. in_memory: where there is no cache."""

    cache: Path | None = None
    texts: tuple[str, ...] = ()
    in_memory: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, list[bool] | None] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)


_shelves: WeakKeyDictionary[Any, Shelf] = WeakKeyDictionary()


class _NotKept(Exception):
    """What came cannot be written: it holds other things than tensors and plain values."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


@contextmanager
def keeping(pipe: Any, texts: Iterable[str], cache: Path | None) -> Iterator[None]:
    """Inside, what is encoded for this pipeline is read from and written to the cache.

    texts: all prompts that will be asked for, in any order and as often as they come; none are known if empty.
    """
    shelf = _shelves.setdefault(pipe, Shelf())
    before = shelf.cache, shelf.texts
    shelf.cache, shelf.texts = cache, tuple(dict.fromkeys(texts))
    try:
        yield
    finally:
        shelf.cache, shelf.texts = before


def forget_prompts(pipe: Any) -> None:
    """What is kept in memory is encoded anew when it is next asked for; artifacts stay."""
    _shelves.pop(pipe, None)


def encoding_once(pipe: Any, running: Any, device: torch.device) -> Encode:
    """The encode_prompt of `running` (the pipeline `pipe` around other parts, computing on the device), with its memory.

    It is asked with texts and settings. Where tensors or other things are among them, nothing is kept.
    """
    encode = running.encode_prompt

    @functools.wraps(encode)
    def remembering(*args: Any, **kwargs: Any) -> Any:
        given = _by_name(encode, args, kwargs)
        plain = all(isinstance(leaf, (*PLAIN, torch.device, torch.dtype)) for leaf in tree_leaves(given))
        if not plain or _without_weights(pipe) or not getattr(pipe, KEEPS_PROMPTS, True):
            return encode(*args, **kwargs)
        asked = _Asked(_shelves.setdefault(pipe, Shelf()), pipe, running, encode, device)
        return tree_map_only(Tensor, lambda tensor: tensor.to(device, copy=True), asked.of(given))

    return remembering


def _by_name(encode: Encode, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """All that it is called with, defaults too."""
    signature = inspect.signature(encode)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    more = [name for name, each in signature.parameters.items() if each.kind is each.VAR_KEYWORD]
    given = {name: value for name, value in bound.arguments.items() if name not in more}
    return given | {name: value for each in more for name, value in bound.arguments[each].items()}


@dataclass(frozen=True)
class _Asked:
    """One pipeline that asks for its prompts."""

    shelf: Shelf
    pipe: Any
    running: Any
    encode: Encode
    device: torch.device

    def of(self, given: Arguments) -> Any:
        """What encode_prompt gives for these arguments; tensors on the CPU, not to be changed."""
        texts = given.get("prompt")
        if not isinstance(texts, list) or not texts:
            return self.kept(given)
        by_row = [name for name, value in given.items() if isinstance(value, list) and len(value) == len(texts)]
        rows = [given | _counted(given, 1) | {name: [given[name][row]] for name in by_row} for row in range(len(texts))]
        if len(rows) == 1:
            self.encode_missing(given, rows)
            return self.kept(given)
        lies_by_row = self.split(given, by_row)
        if lies_by_row is None:
            return self.kept(given)
        self.encode_missing(given, rows)
        distinct = {self.key(row): row for row in rows}
        encoded = {key: self.kept(row) for key, row in distinct.items()}
        joined = _joined([encoded[self.key(row)] for row in rows], lies_by_row)
        return self.kept(given) if joined is None else joined

    def kept(self, given: Arguments) -> Any:
        key, memory = self.key(given), self.shelf.in_memory
        if key in memory:
            return memory[key]
        if self.shelf.cache is None:
            found = self.made(given)
            if sum(map(_bytes_of, (*memory.values(), found))) <= KEPT_BYTES:
                memory[key] = found
            return found
        try:
            return obtain(self.address(key), lambda: self.keepable(given), _write, _read).value
        except _NotKept as made:
            return made.found

    def made(self, given: Arguments) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), self.encode(**given))

    def keepable(self, given: Arguments) -> Any:
        found = self.made(given)
        if not all(isinstance(leaf, (*PLAIN, Tensor)) for leaf in tree_leaves(found)):
            raise _NotKept(found)
        return found

    def address(self, key: str) -> Address:
        assert self.shelf.cache is not None
        return Address(self.shelf.cache, KIND, key, f"an encoded prompt of {type(self.pipe).__name__}")

    def encode_missing(self, given: Arguments, rows: Sequence[Arguments]) -> None:
        """If one of the rows is not kept: encode it and all prompts of the run that are not, the encoders on the device."""
        if self.shelf.cache is None or all(self.is_kept(row) for row in rows):
            return
        wanted = {self.key(row): row for row in (*rows, *self.others(given, rows[0]))}
        missing = [row for row in wanted.values() if not self.is_kept(row)]
        with ExitStack() as stack:
            if len(missing) > 1:
                for encoder in self.encoders_that_fit():
                    stack.enter_context(placed_on(encoder, self.device))
            for row in progress(missing, total=len(missing), desc="encode prompts"):
                self.kept(row)

    def is_kept(self, row: Arguments) -> bool:
        return self.address(self.key(row)).folder.exists()

    def others(self, given: Arguments, row: Arguments) -> list[Arguments]:
        """The same call for each prompt of the run; none if this call is not for some of those, or says more of each."""
        texts = given["prompt"]
        same = [name for name, value in given.items() if value == texts]
        beside = [value for name, value in given.items() if isinstance(value, list) and name not in same]
        if not set(texts) <= set(self.shelf.texts) or any(len(set(value)) > 1 for value in beside):
            return []
        return [row | {name: [text] for name in same} for text in self.shelf.texts]

    def encoders_that_fit(self) -> list[nn.Module]:
        """All of them, if the device has room for them side by side; else none, and they take turns."""
        if self.device.type == "cpu":
            return []
        found = [part for name, part in _reading(self.pipe) if isinstance(part, nn.Module)]
        free = free_memory(self.device)
        return found if free is not None and bytes_of(found) <= ROOM * free else []

    def split(self, given: Arguments, by_row: list[str]) -> list[bool] | None:
        """Of each tensor that comes, whether it has a row per prompt; None if it depends on what else is in the call."""
        texts = given["prompt"]
        tried = {name: list(PAIR) if given[name] == texts else [given[name][0]] * len(PAIR) for name in by_row}
        pair = given | tried | _counted(given, len(PAIR))
        key = self.key(pair)
        if key not in self.shelf.splits:
            together = self.kept(pair)
            one = pair | _counted(given, 1)
            alone = [self.kept(one | {name: [pair[name][row]] for name in by_row}) for row in range(len(PAIR))]
            self.shelf.splits[key] = _lie_by_row(together, alone)
        return self.shelf.splits[key]

    def key(self, given: Arguments) -> str:
        """Of all that makes it: encoders and tokenizers, texts and settings, the pipeline's own plain values, our code."""
        if not self.shelf.made_by:
            self.shelf.made_by |= _made_by(self.pipe)
        own = {name: value for name, value in vars(self.running).items() if isinstance(value, PLAIN)}
        device = self.device.type
        arguments = tree_map_only((torch.device, torch.dtype), lambda each: getattr(each, "type", str(each)), given)
        return canonical_sha256(self.shelf.made_by | {"arguments": arguments, "own": own, "device": device})


def _counted(given: Arguments, prompts: int) -> Arguments:
    """How many prompts there are, for pipelines that say so (HunyuanVideo-1.5)."""
    return {"batch_size": prompts} if given.get("batch_size") == len(given["prompt"]) else {}


def _reading(pipe: Any) -> list[tuple[str, Any]]:
    """The pipeline's text encoders, tokenizers and what else may have a say, by name."""
    return [
        (n, part) for n, part in sorted(pipe.components.items()) if not n.startswith(READ_NOTHING) and part is not None
    ]


def _without_weights(pipe: Any) -> bool:
    """Of a plan: nothing is encoded, only counted."""
    parts = [part for _, part in _reading(pipe) if isinstance(part, nn.Module)]
    return any(parameter.is_meta for part in parts for parameter in part.parameters())


def _made_by(pipe: Any) -> dict[str, Any]:
    sources = [inspect.getsourcefile(type(pipe)), __file__]
    return {
        "pipeline": type(pipe).__name__,
        "sources": [file_sha256(Path(path)) for path in sources if path is not None],
        "packages": {name: package_version(name) for name in PACKAGES},
        "parts": {name: _part_sha256(part) for name, part in _reading(pipe)},
    }


def _part_sha256(part: Any) -> str:
    """Of an encoder's weights and configuration, of a tokenizer's files."""
    if isinstance(part, nn.Module):
        config = getattr(part, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        said = {name: value for name, value in config.items() if not name.startswith("_")}  # such as where it was
        described = json.loads(json.dumps(said, default=str, sort_keys=True))
        return canonical_sha256([type(part).__name__, described, tensors_sha256(part.state_dict())])
    if not hasattr(part, "save_pretrained"):
        return canonical_sha256([type(part).__name__, repr(part) if isinstance(part, PLAIN) else ""])
    with tempfile.TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return canonical_sha256([type(part).__name__, {path.name: file_sha256(path) for path in files}])


def _lie_by_row(together: Any, alone: Sequence[Any]) -> list[bool] | None:
    whole, tree = tree_flatten(together)
    parts = [tree_flatten(each) for each in alone]
    if any(spec != tree for _, spec in parts):
        return None
    found = []
    for expected, *each in zip(whole, *(leaves for leaves, _ in parts), strict=True):
        if not isinstance(expected, Tensor):
            if any(other != expected for other in each):
                return None
            found.append(False)
        elif all(_close(expected, other) for other in each):
            found.append(False)
        elif _stackable(each) and _close(expected, torch.cat(each)):
            found.append(True)
        else:
            return None
    return found


def _close(expected: Tensor, found: Any) -> bool:
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    distance = (expected.double() - found.double()).norm()
    return bool(distance <= CLOSE[expected.element_size()] * expected.double().norm())


def _stackable(each: Sequence[Any]) -> bool:
    shapes = {tuple(part.shape) if isinstance(part, Tensor) and part.ndim else None for part in each}
    return len(shapes) == 1 and None not in shapes


def _joined(rows: Sequence[Any], lies_by_row: Sequence[bool]) -> Any:
    """What was encoded one by one as one call gives it; None if the rows are not alike."""
    _, tree = tree_flatten(rows[0])
    leaves = [tree_flatten(row)[0] for row in rows]
    if any(len(each) != len(lies_by_row) for each in leaves):
        return None
    found = []
    for by_row, *each in zip(lies_by_row, *leaves, strict=True):
        if by_row and not _stackable(each):
            return None
        if not by_row and isinstance(each[0], Tensor) and any(other.shape != each[0].shape for other in each):
            return None
        found.append(torch.cat(each) if by_row else each[0])
    return tree_unflatten(found, tree)


def _bytes_of(nested: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(nested) if isinstance(leaf, Tensor))


def _write(encoded: Any, folder: Path) -> None:
    leaves, tree = tree_flatten(encoded)
    tensors = {str(place): leaf.contiguous().clone() for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    save_tensors(tensors, folder / TENSORS)
    (folder / TREE).write_text(json.dumps({"tree": treespec_dumps(tree), "plain": plain}))


def _read(folder: Path) -> Any:
    told, tensors = json.loads((folder / TREE).read_text()), load_file(folder / TENSORS)
    leaves = [tensors.get(str(place), value) for place, value in enumerate(told["plain"])]
    return tree_unflatten(leaves, treespec_loads(told["tree"]))
