"""Real processes: ranks with loader workers, killed with SIGKILL at random steps and started again on other numbers.

The suite kills twice; `KILLS=20 pytest tests/test_resume.py` does so twenty times.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data.mmud import MmudSource
from pipeline.data.writer import pack

KILLS = int(os.environ.get("KILLS", "2"))
STEPS = 60 if KILLS < 10 else 400
BATCH, EVERY = 8, 5
pytestmark = pytest.mark.timeout(600 + 60 * KILLS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two data sets of 75 and 40 samples, in shards of 10 and of 7."""
    here = Path(__file__).parent / "data" / "mmud"
    roots = []
    for name, times, per_shard in (("a", 15, 10), ("b", 8, 7)):
        source, out = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}-packed")
        rows = pickle.loads((here / "train.pkl").read_bytes()) * times
        (source / "train.pkl").write_bytes(pickle.dumps(rows))
        pack(MmudSource(source, here / "images"), "train", out, samples_per_shard=per_shard, resize=32, progress=False)
        roots.append(str(out))
    return ",".join(roots)


def start(folder: Path, data: str, world: int, workers: int, attempt: int) -> list[subprocess.Popen[bytes]]:
    repo = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(repo), os.environ.get("PYTHONPATH", "")]),
        "DATA": data,
        "WORLD_SIZE": str(world),
        "MEETING": str(folder / f"meeting-{attempt}"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(repo / "tests" / "reader_job.py"), str(folder)]
    command += [str(number) for number in (workers, BATCH, STEPS, EVERY)]
    return [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, start_new_session=True
        )
        for rank in range(world)
    ]


def steps_logged(folder: Path) -> int:
    return (folder / "log").read_bytes().count(b"\n") if (folder / "log").exists() else 0


def finish(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error.decode()[-3000:]


def kill(ranks: list[subprocess.Popen[bytes]], victim: int) -> None:
    """SIGKILL one rank, and then the others with their workers, as a launcher or SLURM would."""
    ranks[victim].send_signal(signal.SIGKILL)
    time.sleep(0.1)
    for process in ranks:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_runs_that_are_killed_read_what_one_that_was_not_reads(tmp_path, data):
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    quiet.mkdir()
    killed.mkdir()
    finish(start(quiet, data, 2, 2, 0))
    expected = (quiet / "log").read_bytes()
    assert expected.count(b"\n") == STEPS

    chance = random.Random(KILLS)
    stops = sorted(chance.sample(range(3, STEPS - 3), KILLS))
    for attempt, stop in enumerate(stops):
        world, workers = [(2, 2), (1, 2), (4, 1), (2, 0)][attempt % 4]
        ranks = start(killed, data, world, workers, attempt)
        deadline = time.monotonic() + 180
        while steps_logged(killed) <= stop and time.monotonic() < deadline and ranks[0].poll() is None:
            time.sleep(0.005)
        assert ranks[0].poll() is None, ranks[0].communicate()[1].decode()[-3000:]
        kill(ranks, chance.randrange(world))
        assert stop < steps_logged(killed) < STEPS
    finish(start(killed, data, 2, 2, KILLS))
    assert (killed / "log").read_bytes() == expected
