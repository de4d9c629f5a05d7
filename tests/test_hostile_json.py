"""The hostile corpus, second part: JSON files of wrong kinds, and shards that change under a reader's eyes."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import manifest
from pipeline.data.loader import build_loader
from pipeline.data.mixture import make_order, open_data
from pipeline.data.reader import ShardDataset, verify
from pipeline.data.refcoco import RefcocoSource
from pipeline.data.schema import Sample

pytestmark = pytest.mark.timeout(60)
INDEX, MANIFEST, SHARD = "train-000000.index.json", "manifest.json", "train-000000.tar"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


TEXTS = {
    "empty": "",
    "cut": '{"format": "neural-tuning-shards", "sp',
    "binary": "\udcff\udcfe",
    "an array": "[]",
    "a number": "7",
    "null": "null",
    "deep": "[" * 200_000,
    "deep and closed": "[" * 200_000 + "]" * 200_000,
    "a number of 5000 digits": '{"bytes": ' + "9" * 5000 + "}",
    "NaN": '{"format": NaN}',
}


@pytest.mark.parametrize("file", [MANIFEST, INDEX])
@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_no_json_or_another(copy, file, name):
    (copy / file).write_text(TEXTS[name], errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"{file.replace('.', '[.]')}.* --force|pack the data set with") as error:
        ShardDataset(copy, "train")
    assert len(str(error.value)) < 400


FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "splits as a list": (MANIFEST, lambda m: m.update(splits=[])),
    "a split as text": (MANIFEST, lambda m: m["splits"].update(train="x")),
    "a shard as a number": (MANIFEST, lambda m: m["splits"]["train"].update(shards=[3])),
    "a shard upwards": (MANIFEST, lambda m: m["splits"]["train"]["shards"][0].update(name="../../etc/passwd")),
    "a shard elsewhere": (MANIFEST, lambda m: m["splits"]["train"]["shards"][0].update(name="/dev/zero")),
    "a shard of a billion names": (MANIFEST, lambda m: m["splits"]["train"]["shards"][0].update(name="x" * 10**6)),
    "bytes as text": (MANIFEST, lambda m: m["splits"]["train"]["shards"][0].update(bytes="9")),
    "samples as true": (MANIFEST, lambda m: m["splits"]["train"].update(samples=2.5)),
    "another digest": (MANIFEST, lambda m: m["splits"]["train"].update(digest="0")),
    "no files": (INDEX, lambda i: i["samples"][0].update(files=[])),
    "no picture": (INDEX, lambda i: i["samples"][0]["files"].pop("jpg")),
    "an offset below zero": (INDEX, lambda i: i["samples"][0]["files"].update(jpg=[-1, 5, 0])),
    "an offset as true": (INDEX, lambda i: i["samples"][0]["files"].update(jpg=[True, 5, 0])),
    "an offset of a float": (INDEX, lambda i: i["samples"][0]["files"].update(jpg=[1.5, 5, 0])),
    "a terabyte": (INDEX, lambda i: i["samples"][0]["files"].update(jpg=[0, 2**40, 0])),
    "a key twice": (INDEX, lambda i: i["samples"].append(i["samples"][0])),
    "a key upwards": (INDEX, lambda i: i["samples"][0].update(key="../x")),
    "a key as a list": (INDEX, lambda i: i["samples"][0].update(key=["x"])),
    "left_out as numbers": (INDEX, lambda i: i.update(left_out=[1])),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_a_wrong_type(copy, name):
    file, change = FIELDS[name]
    edit(copy / file, change)
    with pytest.raises(
        ValueError, match="damaged|wrong kind|missing|outside|twice|belong together|no finished|names no picture"
    ) as error:
        list(ShardDataset(copy, "train"))
    assert len(str(error.value)) < 400


SAMPLES: dict[str, Callable[[Any], Any]] = {
    "a NaN box": lambda s: s["objects"][0].update(box=[float("nan")] * 4),
    "an infinite box": lambda s: s["objects"][0].update(box=[0, 0, float("inf"), 1]),
    "a box inside out": lambda s: s["objects"][0].update(box=[9, 9, 1, 1]),
    "a box of texts": lambda s: s["objects"][0].update(box=["1", "2", "3", "4"]),
    "a box of a huge number": lambda s: s["objects"][0].update(box=[0, 0, 10**400, 1]),
    "objects as a record": lambda s: s.update(objects={}),
    "an object as null": lambda s: s.update(objects=[None]),
    "phrases as text": lambda s: s["objects"][0].update(phrases="x"),
    "no phrases": lambda s: s["objects"][0].update(phrases=[]),
    "a phrase as a number": lambda s: s["objects"][0].update(phrases=[1]),
    "a mask as text": lambda s: s["objects"][0].update(mask="x"),
    "a mask of a trillion pixels": lambda s: s["objects"][0].update(mask={"size": [10**6, 10**6], "counts": "0"}),
    "a mask cut short": lambda s: s["objects"][0]["mask"].update(counts=s["objects"][0]["mask"]["counts"][:-3]),
    "a mask of true": lambda s: s["objects"][0]["mask"].update(size=[True, True]),
    "a height of true": lambda s: s.update(height=True),
    "a height below zero": lambda s: s.update(height=-5),
    "half a character": lambda s: s.update(caption="\ud800"),
    "half a character in a phrase": lambda s: s["objects"][0].update(phrases=["\ud800"]),
    "a caption as a list": lambda s: s.update(caption=["a"]),
    "a question without an answer": lambda s: s.update(answer=""),
    "a tag without object": lambda s: s.update(answer="<OBJ-99>"),
    "a tag of zero": lambda s: s.update(answer="<OBJ-0>"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_of_wrong_content(packed, name):
    sample = ShardDataset(packed, "train")[0]
    record = json.loads(sample.to_json())
    SAMPLES[name](record)
    with pytest.raises(ValueError, match=r"field '|mask|a tag") as error:
        Sample.from_json(json.dumps(record).encode(), image=sample.image, image_format="jpg")
    assert len(str(error.value)) < 400


ANNOTATIONS: dict[str, Callable[[Any], Any]] = {
    "images as a record": lambda c: c.update(images={}),
    "an image as null": lambda c: c.update(images=[None]),
    "an id as text": lambda c: c["images"][0].update(id="1"),
    "an id as true": lambda c: c["images"][0].update(id=True),
    "a file name as a number": lambda c: c["images"][0].update(file_name=7),
    "an annotation without picture": lambda c: c["annotations"][0].pop("image_id"),
    "categories as text": lambda c: c.update(categories="x"),
    "a category without name": lambda c: c["categories"][0].pop("name"),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_annotation_files(data_dir, tmp_path, name):
    root = Path(shutil.copytree(data_dir / "refcoco", tmp_path / "refcoco"))
    edit(root / "instances.json", ANNOTATIONS[name])
    with pytest.raises(ValueError, match=r"instances\.json, (field '|\w+\[\d+\])") as error:
        RefcocoSource(root, root / "images")
    assert len(str(error.value)) < 400


def test_a_picture_name_cannot_leave_the_folder(data_dir, tmp_path):
    root = Path(shutil.copytree(data_dir / "refcoco", tmp_path / "refcoco"))
    (tmp_path / "secret.jpg").write_bytes((root / "images" / "000000018491.jpg").read_bytes())
    for name in ("../secret.jpg", "../../secret.jpg", str(tmp_path / "secret.jpg"), "images/../../secret.jpg"):
        edit(root / "instances.json", lambda c, name=name: c["images"][0].update(file_name=name))
        made = RefcocoSource(root, root / "images")
        reasons = {getattr(made.load("valid", i), "reason", "") for i in range(3)}
        assert "picture missing" in reasons


def spoil_byte(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def test_a_shard_written_over_while_it_is_read_is_named(copy):
    dataset = ShardDataset(copy, "train")
    assert dataset[0].key
    where = json.loads((copy / INDEX).read_text())["samples"][2]["files"]
    spoil_byte(copy / SHARD, where["jpg"][0] + where["jpg"][1] // 2)
    with pytest.raises(ValueError, match=rf"{SHARD}, sample \d+: the shard was changed since it was packed"):
        dataset[2]
    assert dataset[1].key and dataset[3].key


def test_a_shard_cut_while_it_is_read_is_named(copy):
    dataset = ShardDataset(copy, "train")
    assert dataset[0].key
    os.truncate(copy / SHARD, 1000)
    with pytest.raises(ValueError, match="the shard is cut"):
        dataset[4]


def test_a_shard_replaced_while_it_is_read_goes_on_as_it_was_or_is_named(copy):
    """By rename the old file stays open; a process that opens the new one finds other bytes."""
    opened, unopened = ShardDataset(copy, "train"), ShardDataset(copy, "train")
    expected = opened[0]
    other = bytearray((copy / SHARD).read_bytes())
    other[::7] = bytes(len(other[::7]))
    (copy / "new").write_bytes(other)
    os.replace(copy / "new", copy / SHARD)
    assert opened[0] == expected
    with pytest.raises(ValueError, match="the shard was changed since it was packed"):
        unopened[0]


def test_a_loader_counts_changed_samples_and_stops_when_they_are_many(copy):
    dataset = open_data(str(copy), "train")
    order = make_order(dataset, seed=0, global_batch=5, tasks=("caption",), task_mix=(1.0,))

    class Names:
        """Stands for the collator: what was read and what was not."""

        def __call__(self, good: Any, bad: Any) -> Any:
            self.keys, self.skipped = [sample.key for sample, _ in good], list(bad)
            return self

    where = json.loads((copy / INDEX).read_text())["samples"][2]["files"]
    spoil_byte(copy / SHARD, where["json"][0])
    loader = build_loader(dataset, order, Names(), micro_batch=5, last_step=50, max_bad_share=0.1)  # type: ignore[arg-type]
    steps = iter(loader)
    _, (first,) = next(steps)
    assert len(first.keys) == 4
    assert [line.split(": ")[1] for line in first.skipped] == [f"{SHARD}, sample {dataset.key(2)}"]
    with pytest.raises(ValueError, match="samples could not be read, more than the share of 0.1"):
        list(steps)


def test_a_clip_embedding_that_claims_more_than_it_holds(copy, monkeypatch):
    for shape in ("(9999999999,)", "(4, 4)", "()"):
        head = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}"
        head += " " * (117 - len(head)) + "\n"
        forged = b"\x93NUMPY\x01\x00\x76\x00" + head.encode() + bytes(8)
        path = copy / SHARD
        raw = path.read_bytes()
        index = json.loads((copy / INDEX).read_text())
        index["samples"][0]["files"]["clip.npy"] = [len(raw), len(forged), zlib.crc32(forged)]
        index["bytes"] = len(raw) + len(forged)
        path.write_bytes(raw + forged)
        (copy / INDEX).write_text(json.dumps(index))
        edit(copy / MANIFEST, lambda m, size=index["bytes"]: m["splits"]["train"]["shards"][0].update(bytes=size))
        with pytest.raises(ValueError, match="the CLIP embedding is no float16 vector"):
            ShardDataset(copy, "train")[0]
    with pytest.raises(ValueError, match="its sha256 is not the one in the manifest"):
        list(verify(copy, "train"))
    assert manifest.file_sha256(copy / SHARD)
