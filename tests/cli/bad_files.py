"""The files that bad inputs name: damaged, odd, or something else than they say."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def make_files(folder: Path, finished: Path) -> None:
    """Everything that the commands above name. finished: a results folder with one run."""
    for name, content in texts().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in ("folder", "folder.txt", "strange/runs/default/0123456789ab/record.json"):
        (folder / name).mkdir(parents=True)
    (folder / "loop").symlink_to(folder / "loop")
    arrays(folder)
    for name in ("good", "broken"):
        shutil.copytree(finished, folder / name)
    (record,) = (folder / "broken").glob("runs/default/*/record.json")
    record.write_text(record.read_text()[:-100])


def texts() -> dict[str, str | bytes]:
    return {
        "file": "x",
        "empty.txt": "",
        "blank.txt": "\n\n  \n",
        "deep.json": "[" * 100_000,
        "deep.jsonl": "[" * 100_000 + "\n",
        "deep.yaml": "[" * 5000,
        "binary.txt": bytes(range(256)),
        "utf16.txt": "a fox\n".encode("utf-16"),
        "utf16le.txt": "a fox\n".encode("utf-16-le"),
        "latin.txt": "café\n".encode("latin-1"),
        "long.txt": "x" * 3_000_000,
        "long.tsv": "caption\n" + "x" * 200_000 + "\n",
        "nul.tsv": "caption\na\0b\n",
        "missing.jsonl": '{"foo": 1}\n',
        "number.jsonl": '{"prompt": 3}\n',
        "null.jsonl": "null\n",
        "cut.jsonl": '{"prompt": "a"}\n{"prompt": "b"\n',
        "nan.jsonl": '{"prompt": "a", "x": NaN}\n',
        "digits.jsonl": '{"prompt": "a", "x": ' + "9" * 5000 + "}\n",
        "surrogate.jsonl": '{"prompt": "a \\ud800"}\n',
        "numbers.json": "[1, 2]",
        "number.json": "3",
        "cut.json": '["a", "b"',
        "emptylist.json": "[]",
        "bad.yaml": "a: [1\nb",
        "tag.yaml": "a: !!python/object:os.system x\n",
        "date.yaml": "a: {text: x, d: 2020-01-01}\n",
        "control.yaml": "a: \x01\n",
        "itself.yaml": "a: &a {text: x, b: *a}\n",
        "header.tsv": "foo\tbar\n1\t2\n",
        "cells.tsv": "caption\na\tb\tc\n",
        "prompts.csv": "caption\na\n",
        "text.npz": "hello",
        "empty.npz": "",
        "pickle.npz": pickle.dumps([1]),
        "noimages/a.png": "x",
        "res/runs": "a file",
        "list-index/model_index.json": "[1]",
        "deep-index/model_index.json": "[" * 100_000,
        "binary-index/model_index.json": b"\xff\xfe",
        "odd-index/model_index.json": json.dumps({"_class_name": "DiTPipeline", "transformer": 3}),
        "bad.safetensors": "xx",
        "model.ckpt": "xx",
    }


def arrays(folder: Path) -> None:
    np.savez(folder / "wrong.npz", foo=np.zeros(3))
    np.savez(folder / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(folder / "object.npz", arr_0=np.array([{"a": 1}], dtype=object))
    for name, shape in {"none": (0, 4, 4, 3), "gray": (2, 4, 4), "flat": (2, 0, 0, 3), "whole": (8, 9, 9, 3)}.items():
        np.savez(folder / f"{name}.npz", arr_0=np.zeros(shape, np.uint8))
    whole = (folder / "whole.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("sizes", "bomb"):
        (folder / name).mkdir()
        Image.new("RGB", (16, 16)).save(folder / name / "a.png")
    Image.new("RGB", (17, 16)).save(folder / "sizes" / "b.png")
    claim_size(folder / "bomb" / "a.png", 60_000)


def claim_size(png: Path, pixels: int) -> None:
    """Let a small PNG say that it is pixels × pixels."""
    content = bytearray(png.read_bytes())
    content[16:24] = struct.pack(">II", pixels, pixels)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    png.write_bytes(content)
