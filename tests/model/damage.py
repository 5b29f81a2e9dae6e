"""Random damage to a folder of weights and settings: what disks, downloads and editors do to it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

_LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n"
    "size 4600000\n"
)
_DEEP = "[" * 200_000 + "]" * 200_000


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _write(text):
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _become(make):
    def change(path):
        path.unlink()
        make(path)

    return change


DAMAGED_FILES: dict[str, Callable[[Path], Any]] = {
    "cut": _cut,
    "empty": _write(""),
    "a Git LFS pointer": _write(_LFS_POINTER),
    "deep": _write(_DEEP),
    "deep object": _write('{"a":' * 200_000 + "1" + "}" * 200_000),
    "not UTF-8": _write(b'{"a": "\xc4\xe3"}'),
    "a list": _write("[1]"),
    "a key twice": _write('{"model_type": "qwen2_vl", "model_type": "qwen2_vl"}'),
    "not a number": _write('{"a": NaN}'),
    "half a character": _write('{"a": "\\ud800"}'),
    "an endless number": _write('{"a": %s}' % ("1" * 5000)),
    "a folder": _become(Path.mkdir),
    "a FIFO": _become(os.mkfifo),
    "a device": _become(lambda path: path.symlink_to("/dev/zero")),
    "a link to nothing": _become(lambda path: path.symlink_to("nowhere")),
    "a link to itself": _become(lambda path: path.symlink_to(path)),
}


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object, which may be absent."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **changes}))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file in place, by name."""
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


VALUES: list[Any] = [None, True, False, -1, 0, 3, 1e30, 0.5, "", "x", "14", [], [1], ["x"], {}, {"x": 1}]


def damage_file(data: st.DataObject, folder: Path) -> str:
    """Drop, rename, cut, extend, double or replace one file. Returns what was done."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    path = folder / data.draw(st.sampled_from(names), "file")
    kind = data.draw(st.sampled_from(["drop", "rename", "cut", "extend", "double", "replace", "flip a byte"]), "damage")
    content = path.read_bytes()
    if kind == "drop":
        path.unlink()
    elif kind == "rename":
        path.rename(
            folder / data.draw(st.sampled_from(["x.json", "other.safetensors", "notes.txt", "chat_template.json"]))
        )
    elif kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, max(0, len(content) - 1)))])
    elif kind == "extend":
        path.write_bytes(content + data.draw(st.sampled_from([b"x", b"}", b"\n", b"\0" * 8])))
    elif kind == "double":
        path.write_bytes(content + content)
    elif kind == "replace":
        path.write_bytes((folder / data.draw(st.sampled_from(names), "by")).read_bytes())
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :])
    return f"{kind} {path.name}"


def damage_tensor(data: st.DataObject, file: Path) -> str:
    """Drop, rename, double or replace one tensor, or give it another type, shape or value."""
    weights = load_file(file)
    name, other = (data.draw(st.sampled_from(sorted(weights)), label) for label in ("tensor", "other"))
    kinds = [
        "drop",
        "rename",
        "double",
        "replace",
        "int8",
        "int64",
        "float64",
        "bfloat16",
        "transpose",
        "cut",
        "nan",
        "inf",
    ]
    kind = data.draw(st.sampled_from(kinds), "damage")
    tensor = weights.pop(name)
    changes: dict[str, dict[str, torch.Tensor]] = {
        "drop": {},
        "rename": {f"{name}.x": tensor},
        "double": {name: tensor, f"model.{name}": tensor.clone()},
        "replace": {name: weights.get(other, tensor).clone()},
        "int8": {name: tensor.to(torch.int8)},
        "int64": {name: tensor.to(torch.int64)},
        "float64": {name: tensor.double()},
        "bfloat16": {name: tensor.bfloat16()},
        "transpose": {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor[None]},
        "cut": {name: tensor[:-1].contiguous()},
        "nan": {name: tensor * float("nan")},
        "inf": {name: tensor + float("inf")},
    }
    kind = data.draw(st.sampled_from(sorted(changes)), "damage")
    save_file({**weights, **changes[kind]}, file, metadata={"format": "pt"})
    return f"{kind} {name}"


def damage_json(data: st.DataObject, file: Path) -> str:
    """Drop one value of a JSON tree, put another in its place, double its key, or add one."""
    tree = json.loads(file.read_text())
    places = list(_places(tree))
    parent, key = data.draw(st.sampled_from(places), "place")
    kind = data.draw(st.sampled_from(["drop", "replace", "add"]), "damage")
    if kind == "drop":
        parent.pop(key)
    elif kind == "replace":
        parent[key] = data.draw(st.sampled_from(VALUES), "value")
    elif isinstance(parent, dict):
        parent[data.draw(st.sampled_from(["x", "dtype", "name_or_path"]))] = data.draw(st.sampled_from(VALUES))
    else:
        parent.append(data.draw(st.sampled_from(VALUES)))
    file.write_text(json.dumps(tree))
    return f"{kind} {key} in {file.name}"


def _places(tree: Any) -> Any:
    """Every container with a key of it; of long lists and vocabularies, the first few."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))[:20]
    for key, value in items:
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
