"""--doctor: sound data give no fault, and each planted fault is found under its name, with the sample it is in."""

from __future__ import annotations

import json
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import doctor
from pipeline.data.mmud import MmudSource
from pipeline.data.refcoco import RefcocoSource
from pipeline.data.writer import pack

KEY = "000000006818"
Rows = list[list[Any]]


@pytest.fixture
def copy(data_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_dir / "mmud", tmp_path / "mmud"))


def change_rows(root: Path, change: Callable[[list[Any]], Any], split: str = "train") -> None:
    """Apply `change` to the first row of a split."""
    path = root / f"{split}.pkl"
    rows = [list(row) for row in pickle.loads(path.read_bytes())]
    assert KEY in rows[0][0]
    change(rows[0])
    path.write_bytes(pickle.dumps([tuple(row) for row in rows]))


def examine(root: Path, **more: Any) -> dict[str, Any]:
    source = MmudSource(root, root / "images")
    return doctor.examine(source, source.splits(), progress=False, **more)["splits"]


def put(place: int, value: Any) -> Callable[[list[Any]], None]:
    return lambda row: row.__setitem__(place, value)


def spoil_picture(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda root: change(root / "images" / f"{KEY}.jpg")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def twin_in_valid(root: Path) -> None:
    """The same picture under another name in another split."""
    rows = pickle.loads((root / "train.pkl").read_bytes())
    shutil.copy(root / "images" / f"{KEY}.jpg", root / "images" / "twin.jpg")
    path = root / "valid_withlength.pkl"
    others = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps([*others, ("twin.jpg", *rows[0][1:])]))


def test_sound_data_have_no_fault(copy):
    found = examine(copy)
    assert {split: (each["rows"], each["good"]) for split, each in found.items()} == {
        "train": (5, 5),
        "valid": (2, 2),
        "test": (1, 1),
    }
    assert all(not each["faults"] for each in found.values())


FAULTS = {
    "picture missing": spoil_picture(Path.unlink),
    "picture unreadable": spoil_picture(cut),
    "tag without object": lambda root: change_rows(root, put(2, "##Question: a? ##Answer <SEP>b <LCL-7>.")),
    "fields of different lengths": lambda root: change_rows(root, put(3, [])),
    "mask outside picture": lambda root: change_rows(root, put(4, [[1.0, 1, 700, 1, 700, 600, 1, 600]])),
    "mask of another size": lambda root: change_rows(root, put(4, [[{"size": [9, 9], "counts": [81]}]])),
    "mask empty": lambda root: change_rows(root, put(4, [[5.0, 5, 5, 5, 5, 5]])),
    "mask unreadable": lambda root: change_rows(root, put(4, [[1.0, 2.0, 3.0]])),
    "question unreadable": lambda root: change_rows(root, put(2, "A dog.")),
    "row malformed": lambda root: change_rows(root, put(1, 7)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(copy, name):
    FAULTS[name](copy)
    found = examine(copy)
    assert list(found["train"]["faults"]) == [name]
    fault = found["train"]["faults"][name]
    assert (fault["count"], fault["examples"][0]["key"]) == (1, KEY)
    assert fault["examples"][0]["detail"]
    assert found["train"]["good"] == 4
    assert not found["valid"]["faults"] and not found["test"]["faults"]


NOTES = {
    "object without tag": lambda root: change_rows(root, put(2, "##Question: a? ##Answer <SEP>b.")),
    "tag repeated": lambda root: change_rows(root, put(2, "##Question: a? ##Answer <SEP>b <LCL-1> c <LCL-1>.")),
    "text too long": lambda root: change_rows(root, put(1, "word " * 181)),
    "object in several parts": lambda root: change_rows(
        root, put(4, [[[10.0, 10, 60, 10, 60, 60, 10, 60], [100.0, 100, 160, 100, 160, 160, 100, 160]]])
    ),
    "box beside mask": lambda root: change_rows(root, put(5, [[0.0, 0.0, 3.0, 3.0]])),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_suspicious_thing_is_noted_and_kept(copy, name):
    before = examine(copy)["train"]["notes"].get(name, {"count": 0})["count"]
    NOTES[name](copy)
    found = examine(copy)["train"]
    assert not found["faults"]
    note = found["notes"][name]
    assert note["count"] == before + 1
    assert KEY in [each["key"] for each in note["examples"]]


def test_a_picture_in_two_splits_is_noted_in_the_later_one(copy):
    twin_in_valid(copy)
    found = examine(copy)
    assert "picture in several splits" not in found["train"]["notes"]
    note = found["valid"]["notes"]["picture in several splits"]
    assert note["count"] == 1
    assert note["examples"] == [{"key": "twin", "detail": f"the same bytes as {KEY} of the split 'train'"}]


def test_several_processes_say_the_same(copy, monkeypatch):
    FAULTS["mask empty"](copy)
    monkeypatch.setattr(doctor, "_ROWS_PER_JOB", 2)
    assert examine(copy, workers=2) == examine(copy)


def test_what_the_doctor_calls_a_fault_is_what_packing_leaves_out(copy):
    for name in ("picture missing", "row malformed"):
        FAULTS[name](copy)
    source = MmudSource(copy, copy / "images")
    packed = pack(source, "train", copy / "out", progress=False)
    found = examine(copy)["train"]
    assert packed.rejected == {what: each["count"] for what, each in found["faults"].items()}
    assert packed.samples == found["good"]


def test_objects_that_are_left_out_singly_are_faults_too(data_dir, tmp_path):
    root = Path(shutil.copytree(data_dir / "refcoco", tmp_path / "refcoco"))
    content = json.loads((root / "instances.json").read_text())
    wanted = pickle.loads((root / "refs(kuo).p").read_bytes())[2]["ann_id"]
    next(each for each in content["annotations"] if each["id"] == wanted)["segmentation"] = []
    (root / "instances.json").write_text(json.dumps(content))
    found = doctor.examine(RefcocoSource(root, root / "images"), ["valid"], progress=False)["splits"]["valid"]
    assert (found["rows"], found["good"]) == (3, 3)
    assert found["faults"]["object: mask empty"]["count"] == 1


def test_the_command_writes_the_report_and_tells_by_its_exit_code(copy, tmp_path, monkeypatch, capsys):
    script = Path(__file__).resolve().parents[1] / "pipeline" / "shard_mmud.py"
    flags = ["--source", "mmud", "--mmud_root", copy, "--image_root", copy / "images", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", [script.name, *map(str, flags), "--doctor", "--out", str(tmp_path / "out")])
    for expected in (0, 1):
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        assert ended.value.code == expected
        report = json.loads((tmp_path / "out" / "doctor.json").read_text())
        assert sorted(report) == ["source", "splits"]
        FAULTS["picture missing"](copy) if not expected else None
    said = capsys.readouterr().out
    assert f"left out  picture missing: 1, such as {KEY}: " in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["doctor.json"]
