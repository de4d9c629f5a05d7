"""Packing that is killed, shared among array tasks, or out of disk: the shards' hashes are those of one quiet run.

The suite kills a few times; `KILLS=20 pytest tests/test_packing.py -k killed` does so twenty times.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.data import manifest
from pipeline.data.joining import only_writer, parse_part
from pipeline.data.mmud import MmudSource
from pipeline.data.reader import ShardDataset, verify
from pipeline.data.writer import pack

KILLS = int(os.environ.get("KILLS", "3"))


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows in the split train and 80 in valid, on the eight pictures there are."""
    here = Path(__file__).parent / "data" / "mmud"
    root = tmp_path_factory.mktemp("big")
    rows = pickle.loads((here / "train.pkl").read_bytes()) * 40
    (root / "train.pkl").write_bytes(pickle.dumps(rows))
    (root / "valid.pkl").write_bytes(pickle.dumps(rows[:80]))
    (root / "images").symlink_to(here / "images")
    return root


@pytest.fixture(scope="module")
def quiet(big: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The hashes of one undisturbed run in one process."""
    out = tmp_path_factory.mktemp("quiet")
    for split in ("train", "valid"):
        pack(MmudSource(big, big / "images"), split, out, samples_per_shard=10, progress=False)
    return hashes(out)


def hashes(out: Path) -> dict[str, list[str]]:
    """The shards' hashes as the manifest has them, and as they are."""
    found = {}
    for split, entry in json.loads((out / "manifest.json").read_text())["splits"].items():
        found[split] = [shard["sha256"] for shard in entry["shards"]]
        assert found[split] == [manifest.file_sha256(out / shard["name"]) for shard in entry["shards"]]
    return found


def start(big: Path, out: Path, *flags: str) -> subprocess.Popen[bytes]:
    repo = Path(__file__).resolve().parents[1]
    program = [
        sys.executable, repo / "pipeline" / "shard_mmud.py", "--source", "mmud", "--mmud_root", big,
        "--image_root", big / "images", "--out", out, "--samples_per_shard", "10", *flags,
    ]  # fmt: skip
    # python adds the script's folder, not the repository, to its path.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repo), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(list(map(str, program)), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finished(out: Path) -> int:
    return len(list(out.glob("*.index.json")))


def test_a_packing_killed_again_and_again_gives_the_bytes_of_a_quiet_one(big, quiet, tmp_path):
    """SIGKILL at random moments, with one and with two processes; the same command goes on each time."""
    chance = random.Random(KILLS)
    killed = rounds = 0
    out = tmp_path / "out0"
    while killed < KILLS:
        process = start(big, out, "--workers", str(1 + killed % 2))
        before, deadline = finished(out), time.monotonic() + 120
        # Starting takes seconds; the moments that matter are those between the first shard and the manifest.
        while finished(out) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        error = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), error.decode()
        if (out / "manifest.json").exists() and len(hashes(out)) == 2:
            assert hashes(out) == quiet
            rounds += 1
            out = tmp_path / f"out{rounds}"
    last = start(big, out, "--workers", "2")
    assert last.communicate()[1] is not None
    assert last.returncode == 0
    assert hashes(out) == quiet
    assert not list(out.glob(".*.part"))


def test_a_killed_packing_leaves_no_process_that_goes_on(big, tmp_path):
    process = start(big, tmp_path / "out", "--workers", "2")
    deadline = time.monotonic() + 120
    while not finished(tmp_path / "out") and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)
    before = finished(tmp_path / "out")
    time.sleep(1)
    assert before == finished(tmp_path / "out") < 28


def test_parts_in_any_order_join_into_the_same_bytes(big, quiet, tmp_path):
    source = MmudSource(big, big / "images")
    for i in (3, 1, 2):
        for split in ("train", "valid"):
            result = pack(source, split, tmp_path, samples_per_shard=10, part=(i, 3), progress=False)
            assert (result.waiting == 0) == (i == 2)
            assert (tmp_path / "manifest.json").exists() == (i == 2)
    assert hashes(tmp_path) == quiet
    assert (result.samples, result.shards) == (80, 8)
    assert len(list(verify(tmp_path, "train"))) == 200
    again = pack(source, "train", tmp_path, samples_per_shard=10, part=(2, 3), progress=False)
    assert again.remade == 0
    assert sorted(json.loads((tmp_path / "report.json").read_text())) == ["train", "valid"]


def test_parts_at_the_same_time_as_processes(big, quiet, tmp_path):
    packers = [start(big, tmp_path, "--part", f"{i}/3", "--workers", "1") for i in (1, 2, 3)]
    for packer in packers:
        error = packer.communicate(timeout=300)[1]
        assert packer.returncode == 0, error.decode()
    assert hashes(tmp_path) == quiet


def test_two_packers_that_end_at_once_both_stand_in_the_manifest(tmp_path):
    """Without locks: each looks again after it has written."""
    names = [f"s{i}" for i in range(8)]
    entry = {"samples": 0, "shards": [], "digest": "", "job": "", "rejected": {}}
    threads = [threading.Thread(target=manifest.put_split, args=(tmp_path, name, entry, [])) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(json.loads((tmp_path / "manifest.json").read_text())["splits"]) == names


def test_a_whole_packing_and_a_part_keep_out_of_each_others_way(big, tmp_path):
    source = MmudSource(big, big / "images")
    for held, wanted in (((1, 1), (1, 2)), ((1, 2), (1, 1)), ((2, 2), (2, 2))):
        with only_writer(tmp_path, held), pytest.raises(ValueError, match="another process is packing into"):
            pack(source, "valid", tmp_path, samples_per_shard=10, part=wanted, progress=False)
    with only_writer(tmp_path, (1, 2)):
        assert pack(source, "valid", tmp_path, samples_per_shard=10, part=(2, 2), progress=False).waiting == 4


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5", "1.5/3"])
def test_impossible_parts_are_refused(text):
    with pytest.raises(ValueError, match="--part is i/n with i from 1 to n"):
        parse_part(text)
    assert (parse_part(""), parse_part("2/3")) == ((1, 1), (2, 3))


def test_ranks_that_start_together_queue_for_the_packing(big, tmp_path):
    source, packed = MmudSource(big, big / "images"), []

    def rank():
        packed.append(pack(source, "valid", tmp_path, samples_per_shard=10, progress=False, wait=True))

    with only_writer(tmp_path, (1, 1)):
        waiting = threading.Thread(target=rank)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and not packed
    waiting.join(60)
    assert len(packed) == 1 and (tmp_path / "manifest.json").is_file()


def test_packing_with_other_settings_takes_the_split_out_of_the_manifest_first(big, tmp_path):
    source = MmudSource(big, big / "images")
    pack(source, "valid", tmp_path, samples_per_shard=10, progress=False)
    pack(source, "valid", tmp_path, samples_per_shard=9, part=(1, 2), force=True, progress=False)
    with pytest.raises(ValueError, match="no finished split 'valid'"):
        ShardDataset(tmp_path, "valid")
    pack(source, "valid", tmp_path, samples_per_shard=9, part=(2, 2), progress=False)
    assert len(ShardDataset(tmp_path, "valid")) == len(list(verify(tmp_path, "valid"))) == 80


def test_a_full_disk_is_one_message_and_nothing_half_written(big, quiet, tmp_path):
    """The limit on file sizes stands for the disk: the kernel refuses the write in the same way."""
    source = MmudSource(big, big / "images")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        with pytest.raises(ValueError, match=r"packing into .* stopped: .*Finished shards are kept"):
            pack(source, "train", tmp_path, samples_per_shard=10, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [".packing.lock"]
    pack(source, "train", tmp_path, samples_per_shard=10, progress=False)
    assert hashes(tmp_path)["train"] == quiet["train"]


@pytest.mark.parametrize("moment", range(3))
def test_a_disk_full_at_the_end_of_a_file_leaves_no_part_of_it(big, tmp_path, monkeypatch, moment):
    """fsync is where a network file system tells it: for the first shard, for its index, for the second shard."""
    calls = 0
    real = os.fsync

    def fsync(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls > moment:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ValueError, match="No space left on device"):
        pack(MmudSource(big, big / "images"), "valid", tmp_path, samples_per_shard=10, progress=False)
    assert not list(tmp_path.glob(".*.part"))
    assert not (tmp_path / "manifest.json").exists()
    assert len(list(tmp_path.glob("*.index.json"))) == moment // 2
