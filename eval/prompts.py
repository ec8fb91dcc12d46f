"""Prompt files, in the formats benchmarks publish them in. Every file gives the same thing: texts, and what it says of them.

    .txt     one prompt per line
    .jsonl   one object per line with "prompt" or "text" (GenEval's evaluation_metadata.jsonl)
    .json    a list of objects with "prompt_en", "prompt" or "text" (VBench_full_info.json), or {id: object} (MJHQ-30K)
    .yaml    {id: prompt} (sDCI)
    .tsv     a header with a column "caption", "prompt" or "text" (COCO-2014 captions as MLPerf chose them)

Everything else an object says goes to `Prompt.about`, unchanged; an id goes there as "id". Files are read as far as prompts
are asked for: of 100 MB, two prompts take a moment.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import yaml

from ditbench.eval.data import PROMPTS, names_of, need_file
from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.samples.samples import Prompt

TEXT_FIELDS = ("prompt_en", "prompt", "text", "caption")


LONGEST = 50_000  # characters of one prompt
DEEPEST = 20  # of what else a file says of a prompt
ODD = re.compile(r"[\x00-\x08\x0e-\x1f\ud800-\udfff]")  # control characters, halves of surrogate pairs
SPACE = re.compile(r"[ \t\r\n]*")
Read = Iterator[Prompt]


def load_prompts(path_or_name: str | Path, most: int | None = None) -> tuple[Prompt, ...]:
    """The prompts of a file, or of a set known to `ditbench data list`, in the order they have there.

    most: no more than the first so many; what comes after them in the file is not looked at.

    Raises:
        UserError: no such file or set, or it holds something else than prompts.
    """
    path = Path(path_or_name)
    if not path.is_file():
        path = _file_of_set(path)
    if path.suffix not in _READERS:
        raise UserError(f"{path}: expected a prompt file ({', '.join(_READERS)}), came {path.suffix or 'no ending'}")
    try:
        with path.open(encoding="utf-8-sig") as file:
            prompts = tuple(islice(_READERS[path.suffix](path, file), most))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected text in UTF-8, came {error.reason} at byte {_first_odd_byte(path)}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}: expected prompts, came brackets nested without end; give another file") from error
    if not prompts:
        raise UserError(f"{path}: expected prompts, came none; give another file")
    return prompts


def _first_odd_byte(path: Path) -> int:
    """Where a file stops being UTF-8: a decoder that reads it piece by piece counts within the piece."""
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _file_of_set(path: Path) -> Path:
    sets = names_of(PROMPTS)
    if str(path) in sets:
        return need_file(str(path))
    if len(path.parts) == 1 and not path.suffix:
        raise unknown_name("prompt set", str(path), sets)
    raise UserError(f"{path}: no such file; expected a prompt file ({', '.join(_READERS)}) or one of {', '.join(sets)}")


def _lines(path: Path, file: IO[str]) -> Read:
    for number, line in _numbered(path, file):
        for part in line.splitlines():  # at every kind of line's end
            if part.strip():
                yield _prompt(part, f"{path}, line {number}")


def _json_lines(path: Path, file: IO[str]) -> Read:
    for number, line in _numbered(path, file, about=2**20):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: expected a JSON object, came {_said(error)}; mend it") from error
            yield _prompt(value, where)


def _numbered(path: Path, file: IO[str], about: int = 0) -> Iterator[tuple[int, str]]:
    """Lines by their numbers. about: characters that a line may have beside its prompt."""
    number, most = 0, LONGEST + about
    while line := file.readline(most + 1):
        number += 1
        if len(line) > most:
            raise UserError(f"{path}, line {number}: expected a prompt, came more than {most:,} characters; split it")
        yield number, line


def _json(path: Path, file: IO[str]) -> Read:
    """Entry by entry: the text is held, what it says is not."""
    text = file.read()
    at = _after_space(text, 0)
    try:
        if text[at : at + 1] not in ("[", "{"):
            value = json.loads(text)
            raise UserError(f"{path}: expected a list or a mapping of prompts, came {type(value).__name__}")
        yield from _entries(path, text, at)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: expected JSON, came {error.msg}; mend it") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: expected JSON, came {_said(error)}; mend it") from error


def _entries(path: Path, text: str, at: int) -> Read:
    """Of the list or mapping that begins at a place in the text.

    Raises:
        ValueError: it is not JSON as far as it is read.
    """
    decoder, named, number = json.JSONDecoder(), text[at] == "{", 0
    closing = "}" if named else "]"
    at = _after_space(text, at + 1)
    while text[at : at + 1] != closing or number:
        number += 1
        if named:
            if text[at : at + 1] != '"':
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
            name, at = decoder.raw_decode(text, at)
            at = _after(text, at, ":")
            value, at = decoder.raw_decode(text, at)
            yield _prompt(value, f"{path}, entry {name!r}", id=name)
        else:
            value, at = decoder.raw_decode(text, at)
            yield _prompt(value, f"{path}, entry {number}")
        at = _after_space(text, at)
        if text[at : at + 1] == closing:
            break
        at = _after(text, at, ",")
    if text[_after_space(text, at + 1) :]:
        raise json.JSONDecodeError("Extra data", text, at + 1)


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found is not None, "no space is space too"
    return found.end()


def _after(text: str, at: int, sign: str) -> int:
    at = _after_space(text, at)
    if text[at : at + 1] != sign:
        raise json.JSONDecodeError(f"Expecting {sign!r} delimiter", text, at)
    return _after_space(text, at + 1)


def _yaml(path: Path, file: IO[str]) -> Read:
    """Entry by entry, as the parser comes to them."""
    try:
        loader = yaml.SafeLoader(file)
        loader.get_event()  # the stream's start
        if not loader.check_event(yaml.DocumentStartEvent):
            return
        loader.get_event()
        if not loader.check_event(yaml.MappingStartEvent, yaml.SequenceStartEvent):
            raise UserError(f"{path}: expected a list or a mapping of prompts, came a single value")
        named, number = loader.check_event(yaml.MappingStartEvent), 0
        loader.get_event()
        while not loader.check_event(yaml.MappingEndEvent, yaml.SequenceEndEvent):
            number += 1
            name = loader.construct_document(loader.compose_node(None, None)) if named else number
            value = loader.construct_document(loader.compose_node(None, None))
            yield _prompt(value, f"{path}, entry {name!r}", **({"id": name} if named else {}))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: expected YAML, came {_said(error)}; mend it") from error
    except ValueError as error:  # a date that no calendar has, a number of thousands of digits
        raise UserError(f"{path}: expected YAML, came {_said(error)}; mend it") from error


def _table(path: Path, file: IO[str]) -> Read:
    reader = csv.DictReader(file, delimiter="\t")
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise UserError(f"{where}: expected as many cells as the header has, came more; mend it")
            yield _prompt(row, where)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1}: expected cells, came {_said(error)}; mend it") from error


def _said(error: Exception) -> str:
    """What a parser says is wrong, in its first line."""
    said = getattr(error, "msg", None) or getattr(error, "problem", None) or str(error).strip().split("\n")[0]
    return str(said)[:200]


def _prompt(value: Any, where: str, **about: Any) -> Prompt:
    if isinstance(value, str):
        value = {"text": value}
    fields = [name for name in TEXT_FIELDS if isinstance(value, dict) and value.get(name)]
    if not fields:
        came = f"the fields {', '.join(map(str, value))}"[:200] if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where}: expected a field {' or '.join(TEXT_FIELDS)}, came {came}; add the prompt")
    text = value[fields[0]]
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text in {fields[0]}, came {type(text).__name__}; quote it")
    if len(text) > LONGEST:
        raise UserError(f"{where}: expected a prompt, came {len(text):,} characters; at most {LONGEST:,} are taken")
    if odd := ODD.search(text):
        raise UserError(f"{where}: expected text, came {odd[0]!r} in it; is the file UTF-8, and no binary?")
    about |= {name: item for name, item in value.items() if name != fields[0]}
    _check_plain(about, where)
    return Prompt(text.strip(), about)


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Raise UserError for what no record can hold: YAML has dates, sets, and things that hold themselves; JSON has NaN."""
    if depth > DEEPEST:
        raise UserError(f"{where}: expected fields of text and numbers, came some nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_plain(name, where, depth + 1)
            _check_plain(item, where, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, where, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: expected finite numbers, came {value}; leave it out or write null")
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise UserError(f"{where}: expected text or numbers, came {value} ({type(value).__name__}); quote it")


_READERS: dict[str, Callable[[Path, IO[str]], Read]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".json": _json,
    ".yaml": _yaml,
    ".tsv": _table,
}
