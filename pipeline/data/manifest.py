"""The files beside the shards: manifest.json (what is whole), the shards' indexes, report.json. See shards/FORMAT.md.

The manifest is written last and all at once, so a split it names is complete.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.data.schema import KEY, SCHEMA_VERSION

FORMAT = "neural-tuning-shards"
MANIFEST = "manifest.json"
REPORT = "report.json"
SPLIT_NAME = re.compile(r"[A-Za-z0-9]{1,32}")


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
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON that people can read, atomically."""
    write_atomic(path, (json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, remedy: str) -> Any:
    """A JSON file of ours; ValueError names the file and the remedy."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({str(error)[:100]}): {remedy}") from None


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a packed data set, checked for kind and version. ValueError if it is missing or foreign."""
    path = Path(root) / MANIFEST
    remedy = f"pack the data set with `python pipeline/shard_mmud.py --out {root}`"
    manifest = read_json(path, remedy)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of a packed data set: {remedy}")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {manifest.get('schema_version')!r}, this code reads {SCHEMA_VERSION}: "
            f"{remedy} --force"
        )
    if not isinstance(manifest.get("splits"), dict):
        raise ValueError(f"{path}, field 'splits': missing; {remedy} --force")
    return manifest


def split_entry(manifest: dict[str, Any], root: Path, split: str) -> dict[str, Any]:
    """What the manifest says of one split. ValueError lists the splits there are."""
    entry = manifest["splits"].get(split)
    if not isinstance(entry, dict):
        have = ", ".join(sorted(manifest["splits"])) or "none"
        raise ValueError(f"{root} holds no finished split '{split}' (it has: {have}); pack it, or choose one of these")
    for field, kind in (("shards", list), ("digest", str), ("samples", int)):
        if not isinstance(entry.get(field), kind):
            raise ValueError(f"{Path(root) / MANIFEST}, split '{split}', field '{field}': missing or of the wrong kind")
    return entry


def put_split(root: Path, split: str, entry: dict[str, Any]) -> None:
    """Add or replace one split in the manifest, atomically."""
    path = root / MANIFEST
    splits = read_manifest(root)["splits"] if path.exists() else {}
    splits[split] = entry
    write_json(path, {"format": FORMAT, "schema_version": SCHEMA_VERSION, "splits": splits})


def put_report(root: Path, split: str, left_out: list[dict[str, str]]) -> None:
    """Add or replace one split's list of left-out samples in report.json."""
    path = root / REPORT
    report = read_json(path, "delete it") if path.exists() else {}
    report[split] = left_out
    write_json(path, report)


def splits_digest(indexes: Iterable[dict[str, Any]]) -> str:
    """The digest of a split: sha256 over its shards' hashes and sample keys, in order."""
    return digest_of([[index["sha256"], [sample["key"] for sample in index["samples"]]] for index in indexes])


def check_index(index: Any, path: Path) -> dict[str, Any]:
    """A shard's index, its fields checked; ValueError names the file and the field."""
    remedy = "pack the data set again with --force"
    if not isinstance(index, dict):
        raise ValueError(f"{path} is no shard index: {remedy}")
    for field, kind in (("shard", str), ("bytes", int), ("sha256", str), ("job", str), ("samples", list)):
        if not isinstance(index.get(field), kind):
            raise ValueError(f"{path}, field '{field}': missing or of the wrong kind; {remedy}")
    for sample in index["samples"]:
        good = isinstance(sample, dict) and isinstance(sample.get("files"), dict)
        if not good or not KEY.fullmatch(str(sample.get("key"))):
            raise ValueError(f"{path}, field 'samples': an entry is damaged; {remedy}")
        for where in sample["files"].values():
            whole = isinstance(where, list) and len(where) == 2 and all(type(n) is int and n >= 0 for n in where)
            if not whole or sum(where) > index["bytes"]:
                raise ValueError(f"{path}, sample {sample['key']}: an offset lies outside the shard; {remedy}")
    return index
