"""Several data sets by weight, shards behind URLs, and what an index costs: real shards, in memory and on disk."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from pipeline.data import manifest
from pipeline.data.mixture import MixedDataset, absolute_folders, folders, make_order, open_data, weights_of
from pipeline.data.mmud import MmudSource
from pipeline.data.reader import ShardDataset, verify
from pipeline.data.refcoco import RefcocoSource
from pipeline.data.storage import RemoteFolder
from pipeline.data.writer import pack

TASKS = ("reasoning", "referring", "caption", "generation")
EVEN = (1.0, 1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """MMUD's train (5 samples, 3 shards) and RefCOCO's valid under the name train (3 samples, 2 shards)."""
    data = Path(__file__).parent / "data"
    roots = [tmp_path_factory.mktemp(name) for name in ("mmud", "refcoco")]
    mmud = MmudSource(data / "mmud", data / "mmud" / "images")
    refs = pickle.loads((data / "refcoco" / "refs(kuo).p").read_bytes())
    other = tmp_path_factory.mktemp("source") / "refcocos"
    other.mkdir()
    (other / "instances.json").write_bytes((data / "refcoco" / "instances.json").read_bytes())
    (other / "refs(x).p").write_bytes(pickle.dumps([{**ref, "split": "train"} for ref in refs]))
    pack(mmud, "train", roots[0], samples_per_shard=2, progress=False)
    refcoco = RefcocoSource(other, data / "refcoco" / "images")
    pack(refcoco, "train", roots[1], samples_per_shard=2, progress=False)
    return [str(root) for root in roots]


@pytest.fixture
def in_memory(packed: list[str]) -> str:
    """The first data set behind a URL."""
    fs = fsspec.filesystem("memory")
    for path in Path(packed[0]).glob("[!.]*"):
        fs.pipe_file(f"/bucket/mmud/{path.name}", path.read_bytes())
    return "memory://bucket/mmud"


def order_of(dataset: MixedDataset, weights: tuple[float, ...] = (), batch: int = 6, window: int = 0, seed: int = 3):
    return make_order(
        dataset, seed=seed, global_batch=batch, tasks=TASKS, task_mix=EVEN, weights=weights, window=window
    )


def test_without_weights_an_epoch_is_all_samples_of_all_sets(packed):
    data = open_data(",".join(packed), "train")
    assert (len(data), data.sizes, data.shard_sizes) == (8, (5, 3), (2, 2, 1, 2, 1))
    assert [data.key(i) for i in range(8)] == [data[i].key for i in range(8)]
    assert [data[i].source for i in (0, 4, 5, 7)] == ["mmud", "mmud", "refcocos", "refcocos"]
    order = order_of(data, batch=4)
    seen = [item.sample for step in range(2) for item in order.items(step)]
    assert sorted(seen) == list(range(8))
    with pytest.raises(IndexError):
        data[8]


def test_with_weights_each_set_has_its_share_of_every_batch_and_its_own_epochs(packed):
    data = open_data(",".join(packed), "train")
    order = order_of(data, (2.0, 1.0))
    seen = [item for step in range(30) for item in order.items(step)]
    for step in range(30):
        assert Counter(item.sample < 5 for item in order.items(step)) == {True: 4, False: 2}
    for first, size in ((0, 5), (5, 3)):
        own = [item for item in seen if first <= item.sample < first + size]
        for epoch in range(len(own) // size):
            part = own[epoch * size : (epoch + 1) * size]
            assert sorted(item.sample for item in part) == list(range(first, first + size))
    assert [order_of(data, (2.0, 1.0)).items(step) for step in (7, 3)] == [order.items(7), order.items(3)]
    assert order.items(0) != order_of(data, (1.0, 2.0)).items(0)


def test_the_digest_is_of_all_sets_and_their_order(packed):
    one, two, both = (open_data(text, "train").digest for text in (*packed, ",".join(packed)))
    assert one == ShardDataset(packed[0], "train").digest
    assert len({one, two, both, open_data(",".join(packed[::-1]), "train").digest}) == 4


def test_what_data_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folders(" a, s3://b/c ,") == ["a", "s3://b/c"]
    assert absolute_folders("a,s3://b/c") == f"{tmp_path / 'a'},s3://b/c"
    assert (weights_of("", 2), weights_of("2,1", 2)) == ((), (2.0, 1.0))
    for text in ("1", "1,2,3", "a,b", "1,0", "1,-1", "nan,1", "inf,1", "1e-9,1"):
        with pytest.raises(ValueError, match="--data names 2 data sets; give one weight for each"):
            weights_of(text, 2)
    with pytest.raises(ValueError, match="--data names no data set"):
        open_data(" , ", "train")


def test_the_set_that_lacks_a_split_is_named(packed):
    with pytest.raises(ValueError, match=rf"--data {packed[1]}: .* no finished split 'test'"):
        open_data(f"{packed[1]},{packed[0]}", "test")


def test_shards_behind_a_url_are_read_as_from_a_folder(packed, in_memory):
    local, remote = ShardDataset(packed[0], "train"), ShardDataset(in_memory, "train")
    assert (remote.digest, len(remote)) == (local.digest, 5)
    assert list(remote) == list(local) == list(pickle.loads(pickle.dumps(remote)))
    assert list(verify(in_memory, "train")) == list(verify(f"file://{packed[0]}", "train"))
    mixed = open_data(f"{in_memory},{packed[1]}", "train")
    assert mixed[0] == local[0]


def test_faults_behind_a_url_are_named_with_the_url(in_memory, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    fs = fsspec.filesystem("memory")
    dataset = ShardDataset(in_memory, "train")
    shard = "/bucket/mmud/train-000001.tar"
    whole = fs.cat_file(shard)
    fs.pipe_file(shard, whole[:9000])
    with pytest.raises(ValueError, match=r"memory://bucket/mmud/train-000001\.tar is cut or changed"):
        ShardDataset(in_memory, "train")
    with pytest.raises(ValueError, match=r"train-000001\.tar, sample \d+: the shard is cut"):
        dataset[2]
    fs.rm(shard)
    with pytest.raises(ValueError, match=r"train-000001\.tar is missing"):
        ShardDataset(in_memory, "train")
    with pytest.raises(ValueError, match=r"memory://nowhere/manifest\.json is missing"):
        ShardDataset("memory://nowhere", "train")
    with pytest.raises(ValueError, match="nosuch://x cannot be opened"):
        ShardDataset("nosuch://x", "train")


def test_a_network_that_fails_now_and_then_is_asked_again(in_memory, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    fs = fsspec.filesystem("memory")
    real, calls = type(fs).cat_file, Counter[str]()

    def cat_file(self, path, **more):
        calls[path] += 1
        if calls[path] % 4:
            raise ConnectionResetError("by peer")
        return real(self, path, **more)

    monkeypatch.setattr(type(fs), "cat_file", cat_file)
    assert RemoteFolder(in_memory).read("manifest.json")
    assert waits == [0.5, 1.0, 2.0]
    monkeypatch.setattr(type(fs), "cat_file", lambda *_, **__: (_ for _ in ()).throw(ConnectionResetError("by peer")))
    with pytest.raises(ValueError, match="ConnectionResetError: by peer .tried 4 times"):
        ShardDataset(in_memory, "train")


def test_a_window_keeps_reads_within_a_few_shards():
    sizes = (100,) * 40

    class Many(MixedDataset):
        def __init__(self) -> None:
            self.sizes, self.shard_sizes = (4000,), sizes
            self._ends = [4000]

    order = order_of(Many(), batch=100, window=400)
    seen = [item.sample for step in range(80) for item in order.items(step)]
    assert sorted(seen[:4000]) == sorted(seen[4000:]) == list(range(4000))
    assert seen[:4000] != seen[4000:]
    for start in range(0, 4000, 400):
        assert len({sample // 100 for sample in seen[start : start + 400]}) == 4
    assert seen[:100] != sorted(seen[:100])
    assert order.window == 400
    assert order_of(Many(), window=4000).window == 0


def test_the_index_of_36000_samples_opens_fast_and_small(tmp_path):
    """In a process of its own, so that the memory is that of the index alone."""
    shards, indexes = [], []
    for number in range(36):
        name = manifest.shard_name("train", number)
        where = {"jpg": [0, 150_000, 123456789], "json": [150_528, 2000, 987654321]}
        samples = [{"key": f"{number * 1000 + i:012d}", "files": where} for i in range(1000)]
        index = {"shard": name, "bytes": 10**9, "sha256": "0" * 64, "job": "", "samples": samples, "left_out": []}
        (tmp_path / manifest.index_name(name)).write_bytes(manifest.canonical(index))
        with (tmp_path / name).open("wb") as file:
            file.truncate(10**9)
        indexes.append(index)
        shards.append({"name": name, "samples": 1000, "bytes": 10**9, "sha256": "0" * 64})
    entry = {"samples": 36_000, "shards": shards, "digest": manifest.splits_digest(indexes)}
    whole = {"format": manifest.FORMAT, "schema_version": manifest.SCHEMA_VERSION, "splits": {"train": entry}}
    (tmp_path / "manifest.json").write_text(json.dumps(whole))
    code = (
        "import psutil, sys, time\nfrom pipeline.data.reader import ShardDataset\n"
        "me = psutil.Process()\nbefore, began = me.memory_info().rss, time.process_time()\n"
        "data = ShardDataset(sys.argv[1], 'train')\n"
        "print(len(data), time.process_time() - began, (me.memory_info().rss - before) / 1e6)"
    )
    repo = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repo), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    samples, seconds, megabytes = map(float, done.stdout.split())
    print(f"{seconds:.2f} s, {megabytes:.0f} MB")
    assert samples == 36_000
    assert seconds < 1
    assert megabytes < 100
