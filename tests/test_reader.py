"""Reading back: damage of every kind is named, never passed over. One data set, spoilt in copies."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from pipeline.data.mmud import MmudSource
from pipeline.data.reader import ShardDataset, verify
from pipeline.data.schema import Sample
from pipeline.data.writer import pack


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(__file__).parent / "data" / "mmud"
    out = tmp_path_factory.mktemp("packed")
    pack(MmudSource(root, root / "images"), "train", out, samples_per_shard=3, progress=False)
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def test_samples_by_number_also_in_another_process(packed):
    dataset = ShardDataset(packed, "train")
    assert len(dataset) == 5
    keys = [dataset[i].key for i in (4, 0, 2)]
    assert keys == [dataset.key(i) for i in (4, 0, 2)]
    again = pickle.loads(pickle.dumps(dataset))
    assert again[3] == dataset[3]


def test_missing_things_are_named_with_what_to_do(tmp_path, packed, copy):
    with pytest.raises(ValueError, match=r"manifest\.json is missing: pack the data set with"):
        ShardDataset(tmp_path, "train")
    with pytest.raises(ValueError, match=r"no finished split 'test' \(it has: train\)"):
        ShardDataset(packed, "test")
    (copy / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000001\.tar is missing"):
        ShardDataset(copy, "train")


def test_a_cut_shard_is_found_on_opening_and_while_reading(copy):
    dataset = ShardDataset(copy, "train")
    shard = copy / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"train-000001\.tar is cut or changed"):
        ShardDataset(copy, "train")
    assert dataset[0].key
    with pytest.raises(ValueError, match=r"train-000001\.tar, sample \d+: the shard is cut"):
        dataset[4]


def test_a_changed_byte_is_found_by_verify(copy):
    shard = copy / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(data)
    ShardDataset(copy, "train")
    with pytest.raises(ValueError, match=r"train-000000\.tar: its sha256 is not the one in the manifest"):
        list(verify(copy, "train"))


def test_an_index_of_another_packing_is_refused(copy):
    path = copy / "train-000000.index.json"
    index = json.loads(path.read_text())
    index["samples"] = index["samples"][::-1]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="indexes and manifest do not belong together"):
        ShardDataset(copy, "train")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("manifest.json", lambda m: m.update(schema_version=99), "schema_version 99, this code reads 1"),
        ("manifest.json", lambda m: m.update(format="x"), "no manifest of a packed data set"),
        ("manifest.json", lambda m: m["splits"]["train"].pop("shards"), "field 'shards'"),
        ("train-000000.index.json", lambda m: m.pop("samples"), "field 'samples'"),
        ("train-000000.index.json", lambda m: m["samples"][0]["files"].update(jpg=[0, 10**12]), "outside the shard"),
        ("train-000000.index.json", lambda m: m["samples"][0].update(key="../x"), "an entry is damaged"),
    ],
)
def test_spoilt_files_beside_the_shards_are_named(copy, file, change, message):
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        ShardDataset(copy, "train")
    assert file in str(error.value)


def test_the_schema_names_the_field(packed):
    sample = ShardDataset(packed, "train")[0]
    good = json.loads(sample.to_json())
    more = {"image": sample.image, "image_format": "jpg"}
    assert Sample.from_json(sample.to_json(), **more) == sample
    spoilt = {
        "key": "a.b",
        "height": 0,
        "width": "7",
        "caption": None,
        "answer": "the <OBJ-9>",
        "objects": [{**good["objects"][0], "box": [1, 2, 3]}],
        "schema_version": 2,
    }
    for field, value in spoilt.items():
        with pytest.raises(ValueError, match=field if field != "objects" else "box"):
            Sample.from_json(json.dumps({**good, field: value}).encode(), **more)
    for field in good:
        with pytest.raises(ValueError, match=field):
            Sample.from_json(json.dumps({k: v for k, v in good.items() if k != field}).encode(), **more)
    with pytest.raises(ValueError, match="broken JSON"):
        Sample.from_json(b'{"key": ', **more)
    objects = [{**good["objects"][0], "mask": {"size": [640, 427], "counts": "0"}}]
    with pytest.raises(ValueError, match="mask"):
        Sample.from_json(json.dumps({**good, "objects": objects}).encode(), **more)
