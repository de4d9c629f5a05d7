"""MMUD's pickles as they occur: eight real rows with real pictures (tests/data/mmud), and rows spoilt one by one."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import rle
from pipeline.data.files import find_image
from pipeline.data.mmud import MmudSource
from pipeline.data.mmud_rows import parse_dialogue, to_sample
from pipeline.data.objects import RowError
from pipeline.data.schema import Rejected, Sample


@pytest.fixture
def root(data_dir: Path) -> Path:
    return data_dir / "mmud"


@pytest.fixture
def source(root: Path) -> MmudSource:
    return MmudSource(root, root / "images")


@pytest.fixture
def row(root: Path) -> list:
    return list(pickle.loads((root / "train.pkl").read_bytes())[0])


@pytest.fixture
def picture(root: Path) -> bytes:
    return (root / "images" / "000000006818.jpg").read_bytes()


def test_every_real_row_becomes_a_sample(source):
    assert source.splits() == ["train", "valid", "test"]
    assert [len(source.keys(split)) for split in source.splits()] == [5, 2, 1]
    for split in source.splits():
        for sample in source.iterate(split):
            assert isinstance(sample, Sample)
            assert sample.objects
            assert sample.caption
            assert not re.search(r"<(?!OBJ-\d+>)|##", sample.question + sample.answer)
            assert "<OBJ-1>" in sample.answer
            for each in sample.objects:
                x1, y1, x2, y2 = rle.bounding_box(each.mask)
                assert np.allclose(each.box, (x1, y1, x2, y2), atol=3)


def test_the_data_hold_what_they_are_here_for(root):
    rows = [row for file in root.glob("*.pkl") for row in pickle.loads(file.read_bytes())]
    masks = [mask for row in rows for mask in row[4]]
    assert {"\\" in row[0] for row in rows} == {True, False}
    assert {"##Answer:" in row[2] for row in rows} == {True, False}
    assert {"\n##Answer" in row[2] for row in rows} == {True, False}
    assert any(row[2].count("<LCL-1>") > 1 for row in rows)
    assert {type(mask[0]["counts"]) for mask in masks if isinstance(mask[0], dict)} == {bytes, str}
    assert any(isinstance(mask[0], float) for mask in masks)


@pytest.mark.parametrize(
    "text",
    [
        "##Question: What is it? ##Answer <SEP>The dog <LCL-1> is.",
        "##Question: What is it?\n##Answer: <SEP>The dog <LCL-1> is.",
        "##Question: What is it?\n##Answer: <SEP> The  dog <LCL-01> is. <GLB>",
    ],
)
def test_both_spellings_of_the_dialogue(text):
    assert parse_dialogue(text) == ("What is it?", "The dog <OBJ-1> is.")


def test_a_blank_dialogue_is_none_and_another_text_is_refused():
    assert parse_dialogue(" \n") == ("", "")
    for text in ("A dog.", "##Question: What? ##Answer <SEP>", "##Answer: a ##Question: b"):
        with pytest.raises(RowError, match="enriched_text"):
            parse_dialogue(text)


def test_pictures_are_found_under_all_their_names(tmp_path):
    (tmp_path / "MergedImages").mkdir()
    for name in ("000000000009.jpg", "COCO_val2014_000000000042.jpg", "MergedImages/b.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path.parent / "outside.jpg").write_bytes(b"x")
    found = {
        "D:\\MMUD\\MergedImages\\000000000009.jpg": "000000000009.jpg",
        "COCO_train2014_000000000009.jpg": "000000000009.jpg",
        "train2017/000000000042.jpg": "COCO_val2014_000000000042.jpg",
        "D:\\MMUD\\MergedImages\\b.jpg": "MergedImages/b.jpg",
        "/home/them/b.jpg": "b.jpg",
    }
    for path, file in found.items():
        assert find_image(tmp_path, path) == tmp_path / file
    for path in ("..\\outside.jpg", "../outside.jpg", "", "..", "none.jpg", "a\0b"):
        assert find_image(tmp_path, path) is None


def test_swapped_height_and_width_do_not_matter(row, picture):
    right = to_sample(tuple(row), key="a", image=picture, clip=None)
    row[6], row[7] = row[7], row[6]
    assert to_sample(tuple(row), key="a", image=picture, clip=None) == right
    assert isinstance(right, Sample)
    assert (right.height, right.width) == (640, 427)


def test_overlapping_parts_of_a_mask_count_once(row, picture):
    row[4] = [[[10.0, 10, 60, 10, 60, 60, 10, 60], [30.0, 30, 90, 30, 90, 90, 30, 90]]]
    sample = to_sample(tuple(row), key="a", image=picture, clip=None)
    assert isinstance(sample, Sample)
    mask = rle.decode(sample.objects[0].mask)
    assert mask.max() == 1
    assert mask.sum() == 50 * 50 + 60 * 60 - 30 * 30


def test_numpy_values_in_a_row_are_read(row, picture):
    expected = to_sample(tuple(row), key="a", image=picture, clip=None)
    row[4] = [np.asarray(mask) for mask in row[4]]
    row[5] = np.asarray(row[5])
    assert to_sample(tuple(row), key="a", image=picture, clip=None) == expected


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (1, 7, "row malformed"),
        (2, "no dialogue", "question unreadable"),
        (2, "##Question: a? ##Answer <SEP>b <LCL-2>.", "tag without object"),
        (2, "##Question: a? ##Answer <SEP>b <LCL-0>.", "tag without object"),
        (3, [], "fields of different lengths"),
        (3, [[" "]], "row malformed"),
        (3, "dog", "row malformed"),
        (4, [[]], "mask empty"),
        (4, [[1.0, 2.0, 3.0]], "mask unreadable"),
        (4, [[1.0, 2.0, 3.0, float("nan"), 5.0, 6.0]], "mask unreadable"),
        (4, [[1.0, 1, 700, 1, 700, 600, 1, 600]], "mask outside picture"),
        (4, [[5.0, 5, 5, 5, 5, 5]], "mask empty"),
        (4, [[{"size": [427, 640], "counts": [100, 273180]}]], "mask of another size"),
        (4, [[{"size": [640, 427], "counts": "PPY"}]], "mask unreadable"),
        (4, [[{"size": [640, 427], "counts": "\u00e9"}]], "mask unreadable"),
        (4, [[{"size": [-1, 427], "counts": b"0"}]], "mask unreadable"),
        (4, [[{"counts": b"0"}]], "mask unreadable"),
        (4, [["text"]], "mask unreadable"),
        (9, ["a", "b"], "fields of different lengths"),
    ],
)
def test_a_spoilt_row_is_left_out_by_name(row, picture, place, value, reason):
    row[place] = value
    result = to_sample(tuple(row), key="a", image=picture, clip=None)
    assert isinstance(result, Rejected)
    assert result.reason == reason, result
    assert result.detail


def test_other_things_than_rows_are_left_out(picture):
    for row in (None, (), ("a",) * 3, 5):
        result = to_sample(row, key="a", image=picture, clip=None)
        assert isinstance(result, Rejected)
        assert result.reason == "row malformed"


def test_damaged_and_missing_pictures_are_left_out(tmp_path, root, row, picture):
    for name, data in (("cut", picture[:2000]), ("text", b"hello"), ("gif", b"GIF89a" + bytes(40))):
        result = to_sample(tuple(row), key=name, image=data, clip=None)
        assert isinstance(result, Rejected)
        assert result.reason == "picture unreadable"
    (tmp_path / "images").mkdir()
    (tmp_path / "train.pkl").write_bytes((root / "train.pkl").read_bytes())
    results = list(MmudSource(tmp_path, tmp_path / "images").iterate("train"))
    assert {result.reason for result in results} == {"picture missing"}


def test_keys_stay_unique_when_a_picture_comes_again(tmp_path, row):
    rows = [tuple(row), tuple(row), ("a b.c.jpg", *row[1:]), None, tuple(row)]
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(rows))
    keys = MmudSource(tmp_path, tmp_path).keys("train")
    assert keys == ["000000006818", "000000006818-2", "a_b_c", "row-3", "000000006818-3"]


def test_clip_embeddings_are_packed_when_asked_for(tmp_path, root):
    (tmp_path / "000000006818.pkl").write_bytes(pickle.dumps(np.linspace(-1, 1, 8, dtype=np.float32)[None]))
    first, second, *_ = MmudSource(root, root / "images", tmp_path).iterate("train")
    assert isinstance(first, Sample)
    assert first.clip is not None
    assert first.clip.shape == (8,)
    assert isinstance(second, Rejected)
    assert second.reason == "clip embedding unreadable"


def test_wrong_folders_and_malicious_pickles_stop_with_one_message(tmp_path, root):
    with pytest.raises(ValueError, match=r"--mmud_root .*none.* is no folder"):
        MmudSource(tmp_path / "none", tmp_path)
    with pytest.raises(ValueError, match="holds none of train.pkl"):
        MmudSource(tmp_path, tmp_path)
    flag = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {flag}",)

    (tmp_path / "train.pkl").write_bytes(pickle.dumps([Attack()]))
    with pytest.raises(ValueError, match=r"train\.pkl was refused .* (posix|nt)\.system"):
        MmudSource(tmp_path, tmp_path).keys("train")
    assert not flag.exists()
    (tmp_path / "train.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="must hold a list of 12-tuples, found dict"):
        MmudSource(tmp_path, tmp_path).keys("train")
