"""Packing: deterministic bytes, resume, processes, what is left out, the command line. Up to 2 processes."""

from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import rle
from pipeline.data.reader import ShardDataset, verify
from pipeline.data.schema import ObjectRecord, Rejected, Sample
from pipeline.data.writer import pack


@dataclass
class Fake:
    """A source of `n` tiny samples, of which number 3 is always left out; a picture is any JPEG."""

    picture: bytes
    n: int = 25
    version: int = 0
    fail_at: int = -1

    def fingerprint(self) -> dict[str, Any]:
        return {"source": "fake", "n": self.n, "version": self.version}

    def splits(self) -> list[str]:
        return ["train"]

    def keys(self, split: str) -> list[str]:
        return [f"k{(i * 7) % self.n:03d}" for i in range(self.n)]

    def load(self, split: str, i: int) -> Sample | Rejected:
        key = self.keys(split)[i]
        if i == self.fail_at:
            raise RuntimeError("pulled the plug")
        if i == 3:
            return Rejected(key, "picture missing", "for the test")
        mask = np.zeros((640, 427), np.uint8)
        mask[i : i + 9, 5:50] = 1
        record = ObjectRecord(phrases=("it",), box=(5, i, 50, i + 9), mask=rle.encode(mask), category="thing")
        return Sample(
            key=key,
            image=self.picture,
            image_format="jpg",
            height=640,
            width=427,
            caption=f"caption {i} é",
            question="what?",
            answer="the thing <OBJ-1>.",
            objects=(record,),
            source="fake",
            clip=np.arange(4, dtype=np.float16) + i,
        )


@pytest.fixture
def picture(data_dir: Path) -> bytes:
    return (data_dir / "mmud" / "images" / "000000006818.jpg").read_bytes()


def hashes(out: Path) -> list[str]:
    shards = json.loads((out / "manifest.json").read_text())["splits"]["train"]["shards"]
    return [shard["sha256"] for shard in shards]


def quietly(source: Any, out: Path, **more: Any) -> Any:
    return pack(source, "train", out, samples_per_shard=6, progress=False, **more)


def test_the_same_input_gives_the_same_bytes_in_any_number_of_processes(tmp_path, picture):
    one = quietly(Fake(picture), tmp_path / "one")
    two = quietly(Fake(picture), tmp_path / "two", workers=2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert (one.samples, one.shards, one.remade) == (two.samples, two.shards, two.remade) == (24, 5, 5)
    assert ShardDataset(tmp_path / "one", "train").digest == ShardDataset(tmp_path / "two", "train").digest


def test_samples_come_back_as_they_went_in(tmp_path, picture):
    source = Fake(picture)
    quietly(source, tmp_path)
    expected = {s.key: s for i in range(25) if isinstance(s := source.load("train", i), Sample)}
    dataset = ShardDataset(tmp_path, "train")
    assert [dataset.key(i) for i in range(len(dataset))] == sorted(expected)
    for sample in dataset:
        assert sample == expected[sample.key]
        assert np.array_equal(sample.clip, expected[sample.key].clip)
    assert len(list(verify(tmp_path, "train"))) == 24


def test_what_is_left_out_is_counted_and_listed(tmp_path, picture):
    assert quietly(Fake(picture), tmp_path).rejected == {"picture missing": 1}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {"train": [{"key": "k021", "reason": "picture missing", "detail": "for the test"}]}


def test_packing_again_does_nothing_and_another_source_is_refused(tmp_path, picture):
    quietly(Fake(picture), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert quietly(Fake(picture), tmp_path).remade == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")} == before
    with pytest.raises(ValueError, match="use --force to pack it again"):
        quietly(Fake(picture, version=1), tmp_path)
    assert quietly(Fake(picture, n=11), tmp_path, force=True).shards == 2
    assert len(list(tmp_path.glob("*.tar"))) == 2
    assert len(ShardDataset(tmp_path, "train")) == 10


def test_a_stopped_packing_goes_on_from_its_finished_shards(tmp_path, picture):
    with pytest.raises(RuntimeError):
        quietly(Fake(picture, fail_at=20), tmp_path / "a")
    assert not (tmp_path / "a" / "manifest.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.tar")}
    assert 0 < len(done) < 5
    result = quietly(Fake(picture), tmp_path / "a")
    assert result.remade == 5 - len(done)
    assert all((tmp_path / "a" / name).stat().st_mtime_ns == when for name, when in done.items())
    quietly(Fake(picture), tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert not list((tmp_path / "a").glob(".*.part"))


def test_a_lost_shard_is_made_again(tmp_path, picture):
    quietly(Fake(picture), tmp_path)
    before = hashes(tmp_path)
    (tmp_path / "train-000001.tar").unlink()
    assert quietly(Fake(picture), tmp_path).remade == 1
    assert hashes(tmp_path) == before


def test_plain_webdataset_reads_the_shards(tmp_path, picture):
    webdataset = pytest.importorskip("webdataset")
    quietly(Fake(picture), tmp_path)
    urls = str(tmp_path / "train-{000000..000004}.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == sorted(set(Fake(picture).keys("train")) - {"k021"})
    assert samples[0]["jpg"].size == (427, 640)
    assert samples[0]["json"]["answer"] == "the thing <OBJ-1>."
    assert samples[0]["clip.npy"].shape == (4,)


def test_resize_shrinks_pictures_and_leaves_masks(tmp_path, picture):
    quietly(Fake(picture, n=3), tmp_path, resize=64)
    sample = ShardDataset(tmp_path, "train")[0]
    assert len(sample.image) < len(picture) / 5
    assert (sample.height, sample.width) == (640, 427)
    assert sample.objects[0].mask["size"] == [640, 427]


@pytest.mark.parametrize(
    ("more", "message"),
    [({"workers": 0}, "--workers"), ({"resize": 3}, "--resize")],
)
def test_impossible_arguments_are_refused(tmp_path, picture, more, message):
    with pytest.raises(ValueError, match=message):
        quietly(Fake(picture), tmp_path, **more)
    with pytest.raises(ValueError, match="no split 'dev'; it has: train"):
        pack(Fake(picture), "dev", tmp_path)


def run_main(monkeypatch, *arguments: object) -> int:
    """The script's exit code, in this process: starting Python anew costs seconds each time."""
    script = Path(__file__).resolve().parents[1] / "pipeline" / "shard_mmud.py"
    monkeypatch.setattr(sys, "argv", [script.name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return ended.value.code


def test_the_command_packs_says_so_and_verifies(tmp_path, repo, data_dir, run_python, monkeypatch, capsys):
    root, out = data_dir / "mmud", tmp_path / "out"
    flags = ["--source", "mmud", "--mmud_root", root, "--image_root", root / "images", "--workers", "1", "--out", out]
    done = run_python(repo / "pipeline" / "shard_mmud.py", *flags, env={"PYTHONPATH": str(repo)})
    assert done.returncode == 0, done.stderr
    assert "train: 5 samples in 1 shards" in done.stdout
    assert "valid: 2 samples" in done.stdout
    assert run_main(monkeypatch, *flags) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert run_main(monkeypatch, "--out", out, "--verify") == 0
    assert "train: 5 samples read again, all whole." in capsys.readouterr().out
    data = bytearray((out / "train-000000.tar").read_bytes())
    data[5000] ^= 1
    (out / "train-000000.tar").write_bytes(data)
    assert run_main(monkeypatch, "--out", out, "--verify") == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"shard_mmud\.py: error: .*train-000000\.tar: its sha256 is not the one.*\n", said)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "mmud"], "needs --mmud_root .* and --image_root"),
        (["--mmud_root", "x"], "--mmud_root goes with --source mmud: add it"),
        (["--source", "mmud", "--mmud_root", "none", "--image_root", "none"], "--mmud_root none is no folder"),
        (["--mini_train", "2", "--splits", "dev"], "--splits names dev, but there are only: train, valid, test"),
        (["--verify"], "manifest.json is missing: pack the data set"),
        (["--sources", "mmud"], "no setting `--sources`; did you mean `--source`"),
        (["--source", "coco"], "needs --coco_root .* and --image_root"),
        (["--source", "lvis"], "invalid choice: 'lvis'"),
        (
            ["--source", "coco", "--coco_root", "a", "--image_root", "b", "--refcoco_by", "unc"],
            "goes with --source refcoco",
        ),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, flags, message):
    assert run_main(monkeypatch, "--out", tmp_path, *flags) == 2
    assert re.fullmatch(
        rf"shard_mmud\.py: (error: )?.*{message}.*\n(\(--help lists all flags\)\n)?", capsys.readouterr().err
    )


def test_the_command_explains_its_flags(monkeypatch, capsys):
    assert run_main(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    # The docstring's commands stand on lines of their own, to be copied.
    assert "\n    python pipeline/shard_mmud.py --out shards/mmud --verify\n" in said
    assert "{mini,mmud,refcoco,coco}" in said
    assert "(default: 1000)" in said
    assert "(default: )" not in said
