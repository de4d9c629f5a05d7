"""The files beside the shards: manifest.json (what is whole), the shards' indexes, report.json. See shards/FORMAT.md.

The manifest is written last and all at once, so a split it names is complete.
"""

import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.data.brief import brief
from pipeline.data.schema import KEY, SCHEMA_VERSION
from pipeline.data.storage import LocalFolder, Storage, open_storage

FORMAT = "neural-tuning-shards"
MANIFEST = "manifest.json"
REPORT = "report.json"
SPLIT_NAME = re.compile(r"[A-Za-z0-9]{1,32}")
SHARD_NAME = re.compile(r"[A-Za-z0-9]{1,32}-[0-9]{6,}\.tar")


def shard_name(split: str, number: int) -> str:
    """`train-000003.tar`."""
    return f"{split}-{number:06d}.tar"


def index_name(shard: str) -> str:
    """The index that lies beside a shard: `train-000003.index.json`."""
    return shard.removesuffix(".tar") + ".index.json"


def canonical(value: Any) -> bytes:
    """JSON bytes that depend on the value alone."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """The file appears whole or not at all, also if the machine goes down."""
    part = part_name(path)
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def part_name(path: Path) -> Path:
    """What `path` is called while it is written: a name that nobody else, also on another machine, writes to."""
    writer = f"{socket.gethostname()[:40]}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f".{path.name}.{writer}.part")


def new_folder(path: Path) -> Path:
    """`path`, made if it is missing; ValueError if it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path} cannot be made: {error.strerror}; choose another folder") from None
    return path


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON that people can read, atomically."""
    write_atomic(path, (json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, remedy: str) -> Any:
    """A JSON file of ours; ValueError names the file and the remedy."""
    return read_stored(LocalFolder(path.parent), path.name, remedy)


def read_stored(storage: Storage, name: str, remedy: str) -> Any:
    """As read_json, of a file in a storage."""
    path = storage.where(name)
    try:
        return json.loads(storage.read(name))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({str(error)[:100]}): {remedy}") from None


def read_manifest(root: str | Path) -> dict[str, Any]:
    """The manifest of a packed data set in a folder or at a URL, checked for kind and version. ValueError if it is
    missing or foreign."""
    storage = open_storage(root)
    path = storage.where(MANIFEST)
    remedy = f"pack the data set with `python pipeline/shard_mmud.py --out {root}`"
    manifest = read_stored(storage, MANIFEST, remedy)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of a packed data set: {remedy}")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {brief(manifest.get('schema_version'))}, this code reads {SCHEMA_VERSION}: "
            f"{remedy} --force"
        )
    if not isinstance(manifest.get("splits"), dict):
        raise ValueError(f"{path}, field 'splits': missing; {remedy} --force")
    return manifest


def split_entry(manifest: dict[str, Any], root: str | Path, split: str) -> dict[str, Any]:
    """What the manifest says of one split. ValueError lists the splits there are."""
    entry = manifest["splits"].get(split)
    if not isinstance(entry, dict):
        have = ", ".join(sorted(manifest["splits"])) or "none"
        raise ValueError(f"{root} holds no finished split '{split}' (it has: {have}); pack it, or choose one of these")
    for field, kind in (("shards", list), ("digest", str), ("samples", int)):
        if not isinstance(entry.get(field), kind):
            raise ValueError(f"{root}/{MANIFEST}, split '{split}', field '{field}': missing or of the wrong kind")
    for shard in entry["shards"]:
        whole = isinstance(shard, dict) and isinstance(shard.get("sha256"), str) and type(shard.get("bytes")) is int
        if not whole or not SHARD_NAME.fullmatch(str(shard.get("name"))):
            raise ValueError(f"{root}/{MANIFEST}, split '{split}', field 'shards': an entry is damaged: {brief(shard)}")
    return entry


def put_split(root: Path, split: str, entry: dict[str, Any], left_out: list[dict[str, str]]) -> None:
    """Add or replace one split in the manifest, and its list of left-out samples in report.json.

    Two packers may put two splits at the same moment. Each first writes its split into a file of its own, then joins
    the files of all splits, and looks once more: so the later of the two has both, without any lock.
    """
    write_json(_split_file(root, split), {"entry": entry, "left_out": left_out})
    joined: dict[str, dict[str, Any]] = {}
    while (found := _all_splits(root)) != joined:
        joined = found
        write_json(root / REPORT, {name: each["left_out"] for name, each in joined.items()})
        _write_manifest(root, {name: each["entry"] for name, each in joined.items()})


def drop_split(root: Path, split: str) -> None:
    """Take one split out of the manifest: its shards are about to be made again."""
    _split_file(root, split).unlink(missing_ok=True)
    path = root / MANIFEST
    if path.exists():
        splits = read_manifest(root)["splits"]
        splits.pop(split, None)
        _write_manifest(root, splits)


def _write_manifest(root: Path, splits: dict[str, Any]) -> None:
    write_json(root / MANIFEST, {"format": FORMAT, "schema_version": SCHEMA_VERSION, "splits": splits})


def _split_file(root: Path, split: str) -> Path:
    return root / f".{split}.split.json"


def _all_splits(root: Path) -> dict[str, dict[str, Any]]:
    """{split: {"entry", "left_out"}} of every finished split, from their own files or, failing these, the manifest."""
    path = root / MANIFEST
    report = read_json(root / REPORT, "delete it") if (root / REPORT).exists() else {}
    splits = read_manifest(root)["splits"] if path.exists() else {}
    found = {name: {"entry": entry, "left_out": report.get(name, [])} for name, entry in splits.items()}
    for own in root.glob(".*.split.json"):
        found[own.name[1:].removesuffix(".split.json")] = read_json(own, "delete it")
    return found


def splits_digest(indexes: Iterable[dict[str, Any]]) -> str:
    """The digest of a split: sha256 over its shards' hashes and sample keys, in order."""
    return digest_of([[index["sha256"], [sample["key"] for sample in index["samples"]]] for index in indexes])


def check_index(index: Any, path: str | Path) -> dict[str, Any]:
    """A shard's index, its fields checked; ValueError names the file and the field."""
    remedy = "pack the data set again with --force"
    if not isinstance(index, dict):
        raise ValueError(f"{path} is no shard index: {remedy}")
    fields = (("shard", str), ("bytes", int), ("sha256", str), ("job", str), ("samples", list), ("left_out", list))
    for field, kind in fields:
        if type(index.get(field)) is not kind:
            raise ValueError(f"{path}, field '{field}': missing or of the wrong kind; {remedy}")
    keys = set()
    for sample in index["samples"]:
        good = isinstance(sample, dict) and isinstance(sample.get("files"), dict)
        if not good or not KEY.fullmatch(str(sample.get("key"))):
            raise ValueError(f"{path}, field 'samples': an entry is damaged; {remedy}")
        keys.add(sample["key"])
        for where in sample["files"].values():
            whole = isinstance(where, list) and len(where) in (2, 3) and all(type(n) is int and n >= 0 for n in where)
            if not whole or where[0] + where[1] > index["bytes"]:
                raise ValueError(f"{path}, sample {sample['key']}: an offset lies outside the shard; {remedy}")
    if len(keys) != len(index["samples"]):
        raise ValueError(f"{path}, field 'samples': a key comes twice; {remedy}")
    for record in index["left_out"]:
        if not isinstance(record, dict) or not all(isinstance(record.get(n), str) for n in ("key", "reason", "detail")):
            raise ValueError(f"{path}, field 'left_out': an entry is damaged; {remedy}")
    return index
