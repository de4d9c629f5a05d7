"""RefCOCO's family and COCO: real refs, captions and outlines on three pictures, and spoilt copies of them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import rle
from pipeline.data.coco import CocoSource
from pipeline.data.reader import ShardDataset
from pipeline.data.refcoco import RefcocoSource
from pipeline.data.schema import Partly, Rejected, Sample
from pipeline.data.writer import pack


@pytest.fixture
def real(data_dir: Path) -> Path:
    return data_dir / "refcoco"


@pytest.fixture
def copy(real: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(real, tmp_path / "refcoco+"))


def refs_of(root: Path) -> list[dict[str, Any]]:
    return pickle.loads((root / "refs(kuo).p").read_bytes())


def write_refs(root: Path, refs: Any, by: str = "kuo") -> None:
    (root / f"refs({by}).p").write_bytes(pickle.dumps(refs, protocol=2))


def change_instances(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "instances.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def source(root: Path, by: str = "") -> RefcocoSource:
    return RefcocoSource(root, root / "images", by)


def load_all(made: Any, split: str) -> dict[str, Any]:
    return {key: made.load(split, i) for i, key in enumerate(made.keys(split))}


def first_annotation(root: Path) -> dict[str, Any]:
    wanted = refs_of(root)[0]["ann_id"]
    content = json.loads((root / "instances.json").read_text())
    return next(each for each in content["annotations"] if each["id"] == wanted)


def spoil_first(root: Path, **changes: Any) -> None:
    wanted = refs_of(root)[0]["ann_id"]

    def change(content: dict[str, Any]) -> None:
        next(each for each in content["annotations"] if each["id"] == wanted).update(changes)

    change_instances(root, change)


def test_real_refs_pack_in_full(real, tmp_path):
    assert source(real).splits() == ["valid"]
    packed = pack(source(real), "valid", tmp_path / "out", progress=False)
    assert (packed.samples, packed.rejected) == (3, {})
    samples = {sample.key: sample for sample in ShardDataset(tmp_path / "out", "valid")}
    luggage = samples["000000475678"]
    assert [each.phrases for each in luggage.objects] == [
        ("the grey suitcase behind a blue suitcase",),
        ("the yellow suitcase without a blue tag",),
    ]
    assert luggage.source == "refcoco"
    assert {each.category for each in luggage.objects} == {"suitcase"}
    assert (luggage.caption, luggage.question) == ("", "")
    for sample in samples.values():
        for each in sample.objects:
            assert np.allclose(each.box, rle.bounding_box(each.mask), atol=3)


def test_a_pickle_of_python_2_and_any_file_name_of_a_ref(copy):
    expected = load_all(source(copy), "valid")
    refs = refs_of(copy)
    for ref in refs:
        ref["file_name"] = "COCO_train2014_000000000001_7.jpg"
        ref["sentences"][0]["sent"] = "\xe9clair"
    data = pickle.dumps(refs, protocol=0).replace(b"V\xe9clair", b"S'\\xe9clair'")
    (copy / "refs(kuo).p").write_bytes(data)
    found = load_all(source(copy), "valid")
    assert found.keys() == expected.keys()
    assert all(each.phrases == ("éclair",) for sample in found.values() for each in sample.objects)


def test_every_name_of_a_split(copy):
    """testA is 'A' after test, so a testAB of UNC's RefClef stands in both; val is called valid as everywhere here."""
    refs = refs_of(copy)
    for ref, label in zip(refs, ("train", "testA", "testAB", "testBC"), strict=True):
        ref["split"] = label
    write_refs(copy, refs)
    made = source(copy)
    assert made.splits() == ["train", "testA", "testB", "testC"]
    by_split = {
        split: sorted(ref["ref_id"] for ref in refs if self_phrases(made, split, ref)) for split in made.splits()
    }
    assert by_split == {"train": [1], "testA": [28, 29], "testB": [29, 30], "testC": [30]}
    for ref, label in zip(refs, ("val", "val", "test", "test"), strict=True):
        ref["split"] = label
    write_refs(copy, refs)
    assert source(copy).splits() == ["valid", "test"]


def self_phrases(made: RefcocoSource, split: str, ref: dict[str, Any]) -> bool:
    phrases = {p for sample in load_all(made, split).values() for each in sample.objects for p in each.phrases}
    return ref["sentences"][0]["sent"] in phrases


def test_several_refs_of_one_annotation_are_one_object(copy):
    refs = refs_of(copy)
    twin = {**refs[0], "ref_id": 99, "sentences": [{"sent": "him"}, {"raw": "That one!"}, {"sent": ""}]}
    write_refs(copy, [*refs, twin])
    sample = load_all(source(copy), "valid")["000000018491"]
    assert [each.phrases for each in sample.objects] == [
        ("the person outside the fence who is not sitting", "him", "That one!")
    ]


def test_outlines_as_polygons_rle_and_rle_lists_are_the_same(copy):
    expected = load_all(source(copy), "valid")["000000018491"].objects[0].mask
    height, width = expected["size"]
    flat = rle.decode(expected).flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    text = {"size": [height, width], "counts": expected["counts"]}
    for form in (text, [text], {"size": [height, width], "counts": runs}, [text, text]):
        spoil_first(copy, segmentation=form)
        assert load_all(source(copy), "valid")["000000018491"].objects[0].mask == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"segmentation": []}, "mask empty"),
        ({"segmentation": None}, "row malformed"),
        ({"segmentation": [[1, 2, 3]]}, "mask unreadable"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "mask unreadable"),
        ({"segmentation": [[0, 0, 9000, 0, 9000, 9000]]}, "mask outside picture"),
        ({"segmentation": [{"size": [9, 9], "counts": [81]}]}, "mask of another size"),
        ({"image_id": 475678}, "annotation of another picture"),
        ({"id": 5}, "annotation missing"),
    ],
)
def test_one_object_is_left_out_and_the_others_stay(copy, changes, reason):
    refs = refs_of(copy)
    other = next(
        each
        for each in json.loads((copy / "instances.json").read_text())["annotations"]
        if each["image_id"] == refs[0]["image_id"] and each["id"] != refs[0]["ann_id"] and not each["iscrowd"]
    )
    write_refs(copy, [*refs, {**refs[0], "ref_id": 99, "ann_id": other["id"], "sentences": [{"sent": "it"}]}])
    spoil_first(copy, **changes)
    found = load_all(source(copy), "valid")["000000018491"]
    assert isinstance(found, Partly)
    assert [each.phrases for each in found.sample.objects] == [("it",)]
    assert [each.reason for each in found.left_out] == [f"object: {reason}"]
    packed = pack(source(copy), "valid", copy / "out", progress=False)
    assert (packed.samples, packed.rejected) == (3, {f"object: {reason}": 1})


def test_a_picture_without_any_object_left_and_refs_to_nowhere_are_counted(copy):
    refs = refs_of(copy)
    refs[1]["sentences"] = []
    refs[2]["image_id"] = 4
    (copy / "images" / "000000018491.jpg").unlink()
    write_refs(copy, refs)
    found = load_all(source(copy), "valid")
    reasons = sorted(each.reason for each in found.values() if isinstance(each, Rejected))
    assert reasons == ["no object left", "picture missing", "picture missing"]
    assert sum(isinstance(each, Sample) for each in found.values()) == 1


def test_a_picture_of_another_size_is_left_out(copy):
    change_instances(copy, lambda content: content["images"][0].update(width=50))
    assert pack(source(copy), "valid", copy / "out", progress=False).rejected == {"picture of another size": 1}


def test_a_broken_box_gives_way_to_the_masks(copy):
    for box in ([float("nan")] * 4, [10**400, 0, 1, 1], "x", [1, 2], None):
        spoil_first(copy, bbox=box)
        record = load_all(source(copy), "valid")["000000018491"].objects[0]
        assert record.box == rle.bounding_box(record.mask)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "instances.json").unlink(), r"instances\.json is missing"),
        (lambda root: (root / "refs(kuo).p").unlink(), r"holds no refs\(<by>\)\.p"),
        (lambda root: write_refs(root, [], "unc"), "several divisions; choose one with --refcoco_by: kuo, unc"),
        (lambda root: write_refs(root, {}), "must hold a list of refs, found dict"),
        (lambda root: write_refs(root, [{"split": 3}]), "entry 0: must be a record with a text `split`"),
        (lambda root: write_refs(root, [{"split": "../x"}]), "entry 0: must be a record with a text `split`"),
        (lambda root: change_instances(root, lambda c: c.pop("images")), "field 'images': must be a list"),
        (lambda root: change_instances(root, lambda c: c["images"].append(3)), r"images\[3\]: must be a record"),
        (lambda root: change_instances(root, lambda c: c["images"][1].update(id="1")), r"images\[1\], field 'id'"),
        (lambda root: change_instances(root, lambda c: c["images"].append(c["images"][0])), "comes twice"),
        (lambda root: (root / "instances.json").write_text("[" * 10**5), "is no readable JSON"),
        (lambda root: (root / "instances.json").write_text('{"images": ' + "9" * 5000 + "}"), "is no readable JSON"),
    ],
)
def test_spoilt_files_are_named(copy, spoil, message):
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        source(copy)


def test_a_folder_too_high_names_those_below(copy):
    with pytest.raises(ValueError, match=r"it has the folders refcoco\+: name one of them"):
        RefcocoSource(copy.parent, copy)
    with pytest.raises(ValueError, match=r"--refcoco_by unc: .* has no refs\(unc\)\.p; it has: kuo"):
        source(copy, "unc")


def coco_folder(real: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "coco" / "annotations"
    folder.mkdir(parents=True)
    shutil.copy(real / "captions_val2017.json", folder)
    shutil.copy(real / "instances.json", folder / "instances_val2017.json")
    return folder.parent


def test_coco_has_captions_and_what_is_alone_of_its_kind(real, tmp_path):
    made = CocoSource(coco_folder(real, tmp_path), real / "images")
    assert made.splits() == ["valid"]
    found = {key: each.sample if isinstance(each, Partly) else each for key, each in load_all(made, "valid").items()}
    ball = found["000000018491"]
    assert ball.caption.startswith("A boy catches a ball as a player slides to the base. A boy baseball player")
    names = [each.category for each in ball.objects]
    assert len(set(names)) == len(names) > 0
    assert all(each.phrases == (f"the {each.category}",) for each in ball.objects)
    packed = pack(made, "valid", tmp_path / "out", progress=False)
    assert packed.samples == 3
    assert set(packed.rejected) == {"object: a crowd", "object: not the only one of its kind"}
    objects = sum(len(sample.objects) for sample in ShardDataset(tmp_path / "out", "valid"))
    annotations = json.loads((real / "instances.json").read_text())["annotations"]
    assert objects + sum(packed.rejected.values()) == len(annotations)


def test_coco_without_instances_and_of_another_year(real, tmp_path):
    root = coco_folder(real, tmp_path)
    shutil.copy(real / "captions_val2017.json", root / "annotations" / "captions_train2014.json")
    with pytest.raises(ValueError, match="several years; choose one with --coco_year: 2014, 2017"):
        CocoSource(root, real / "images")
    with pytest.raises(ValueError, match="holds no captions_train2015.json"):
        CocoSource(root, real / "images", "2015")
    made = CocoSource(root, real / "images", "2014")
    assert made.splits() == ["train"]
    assert all(isinstance(each, Sample) and each.caption for each in load_all(made, "train").values())
