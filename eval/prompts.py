"""Prompt files, in the formats benchmarks publish them in. Every file gives the same thing: texts, and what it says of them.

    .txt     one prompt per line
    .jsonl   one object per line with "prompt" or "text" (GenEval's evaluation_metadata.jsonl)
    .json    a list of objects with "prompt_en", "prompt" or "text" (VBench_full_info.json), or {id: object} (MJHQ-30K)
    .yaml    {id: prompt} (sDCI)
    .tsv     a header with a column "caption", "prompt" or "text" (COCO-2014 captions as MLPerf chose them)

Everything else an object says goes to `Prompt.about`, unchanged; an id goes there as "id".
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ditbench.eval.data import PROMPTS, names_of, need_file
from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.samples.samples import Prompt

TEXT_FIELDS = ("prompt_en", "prompt", "text", "caption")


def load_prompts(path_or_name: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a file, or of a set known to `ditbench data list`, in the order they have there."""
    path = Path(path_or_name)
    if not path.is_file():
        path = _file_of_set(path)
    if path.suffix not in _READERS:
        raise UserError(f"{path}: expected a prompt file ({', '.join(_READERS)}), came {path.suffix or 'no ending'}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8, came {error.reason} at byte {error.start}") from error
    prompts = _READERS[path.suffix](path, content)
    if not prompts:
        raise UserError(f"{path}: expected prompts, came none; give another file")
    return tuple(prompts)


def _file_of_set(path: Path) -> Path:
    sets = names_of(PROMPTS)
    if str(path) in sets:
        return need_file(str(path))
    if len(path.parts) == 1 and not path.suffix:
        raise unknown_name("prompt set", str(path), sets)
    raise UserError(f"{path}: no such file; expected a prompt file ({', '.join(_READERS)}) or one of {', '.join(sets)}")


def _lines(path: Path, content: str) -> list[Prompt]:
    return [Prompt(line.strip()) for line in content.splitlines() if line.strip()]


def _json_lines(path: Path, content: str) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: expected a JSON object, came {error.msg}; mend it") from error
            prompts.append(_prompt(value, f"{path}, line {number}"))
    return prompts


def _json(path: Path, content: str) -> list[Prompt]:
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: expected JSON, came {error.msg}; mend it") from error
    return _values(path, value)


def _yaml(path: Path, content: str) -> list[Prompt]:
    try:
        value = yaml.safe_load(content)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: expected YAML, came {error.problem}; mend it") from error
    return _values(path, value)


def _table(path: Path, content: str) -> list[Prompt]:
    reader = csv.DictReader(io.StringIO(content), delimiter="\t")
    return [_prompt(row, f"{path}, line {reader.line_num}") for row in reader]


def _values(path: Path, value: Any) -> list[Prompt]:
    """A list of objects or texts, or a mapping of ids to them."""
    if isinstance(value, dict):
        return [_prompt(item, f"{path}, entry {name!r}", id=name) for name, item in value.items()]
    if isinstance(value, list):
        return [_prompt(item, f"{path}, entry {number}") for number, item in enumerate(value, start=1)]
    raise UserError(f"{path}: expected a list or a mapping of prompts, came {type(value).__name__}")


def _prompt(value: Any, where: str, **about: Any) -> Prompt:
    if isinstance(value, str):
        value = {"text": value}
    fields = [name for name in TEXT_FIELDS if isinstance(value, dict) and value.get(name)]
    if not fields:
        came = f"the fields {', '.join(map(str, value))}" if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where}: expected a field {' or '.join(TEXT_FIELDS)}, came {came}; add the prompt")
    text = value[fields[0]]
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text in {fields[0]}, came {type(text).__name__}; quote it")
    return Prompt(text.strip(), about | {name: item for name, item in value.items() if name != fields[0]})


_READERS: dict[str, Callable[[Path, str], list[Prompt]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".json": _json,
    ".yaml": _yaml,
    ".tsv": _table,
}
