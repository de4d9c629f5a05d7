"""A real SLURM of two nodes on one machine, for tests: its own munged, slurmctld and two slurmd, ended with it.

    with Cluster(folder) as cluster:
        job = cluster.sbatch("slurm/mini.sh", "--max_steps", "4")
        cluster.wait(job, "COMPLETED", seconds=300)

Debian's slurm-wlm and munge are enough. Nothing outside `folder` is touched: key, socket, ports, state and logs are its
own, so that it also runs on a machine that is part of a cluster. The two nodes n1 and n2 are this machine twice.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.runtime.ranks import free_port

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# How long a credential lives is also how long a requeued job is held.
AuthInfo=socket={root}/munge.socket,cred_expire=15
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdDebug=info
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
# Counted, but not there.
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=20
SlurmctldTimeout=300
SlurmdTimeout=600
MessageTimeout=60
JobRequeue=1
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=64 RealMemory=1000 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=64 RealMemory=1000 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class CannotStart(Exception):
    """This machine has no SLURM, or does not let one start."""


class Cluster:
    """`folder` must be new or empty. Raises CannotStart, with the reason, on entering where SLURM cannot run."""

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.root = folder
        clean = {name: v for name, v in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.env = {**clean, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf"), **(env or {})}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        if missing := [name for name in COMMANDS if not shutil.which(name, path=_PATH)]:
            raise CannotStart(f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)")
        if os.geteuid() != 0:
            raise CannotStart("slurmd wants root")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            for job in self._jobs():
                self._ask("scancel", "--signal=KILL", "--full", job, check=False)
            self._ask("scancel", "--user=root", check=False)
        for process in reversed(self._daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in reversed(self._daemons):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start(self) -> None:
        root, host = self.root, socket.gethostname().split(".")[0]
        (root / "state").mkdir(parents=True)
        root.chmod(0o755)
        key = root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = {name: free_port() for name in ("port", "n1", "n2")}
        conf = _CONF.format(root=root, host=host, first_job=_first_job(), **ports)
        (root / "slurm.conf").write_text(conf)
        for number in range(8):
            (root / f"gpu{number}").touch()
        (root / "gres.conf").write_text(f"Name=gpu File={root}/gpu[0-7]\n")
        self._daemon(
            "munged",
            *("--foreground", "--force", f"--key-file={key}", f"--socket={root}/munge.socket"),
            *(f"--pid-file={root}/munged.pid", f"--seed-file={root}/munge.seed", f"--log-file={root}/munged.log"),
        )
        self._until("munged's socket", lambda: (root / "munge.socket").exists(), 30)
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            (root / f"spool-{node}").mkdir()
            self._daemon("slurmd", "-D", "-N", node)
        self._until("both nodes to be idle", self._idle, 60)

    def _daemon(self, name: str, *args: str) -> None:
        log = (self.root / f"{name}{len(self._daemons)}.out").open("wb")
        command = [shutil.which(name, path=_PATH) or name, *args]
        # A group of its own, so that it can be ended with all it started.
        process = subprocess.Popen(
            command, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._daemons.append(process)

    def _idle(self) -> bool:
        done = self._ask("sinfo", "--noheader", "--Node", "--format=%t", check=False)
        return done.stdout.split() == ["idle", "idle"]

    def _until(self, what: str, holds: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            ended = [process.args[0] for process in self._daemons if process.poll() is not None]  # type: ignore[index]
            if ended or time.monotonic() > deadline:
                why = f"{ended[0]} ended" if ended else f"waited {seconds:.0f} s for {what}"
                raise CannotStart(f"{why}:\n{self.logs(lines=15)}")
            time.sleep(0.2)

    def _ask(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done

    def _jobs(self) -> list[str]:
        return self._ask("squeue", "--noheader", "--format=%A", check=False).stdout.split()

    def sbatch(self, *words: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> int:
        """Submits from `cwd` (options, script, its flags); the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)],
            env=self.env | dict(env or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def scontrol(self, *words: str) -> str:
        """What `scontrol` answers."""
        return self._ask("scontrol", *words).stdout

    def scancel(self, *words: str) -> None:
        """`scancel` with these options."""
        self._ask("scancel", *words)

    def facts(self, job: int) -> dict[str, str]:
        """`scontrol show job` of one job (of an array: of its first task still shown)."""
        text = self.scontrol("show", "job", "-o", str(job)).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def states(self, job: int) -> set[str]:
        """The states of a job, or of all tasks of an array."""
        lines = self.scontrol("show", "job", "-o", str(job)).splitlines()
        return {word.split("=", 1)[1] for line in lines for word in line.split() if word.startswith("JobState=")}

    def wait(self, job: int, *, seconds: float = 300) -> set[str]:
        """Waits until the job, and every task of an array, has ended for good; its states."""
        going = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
        self.poll(lambda: not self.states(job) & going, f"job {job} to end", seconds)
        return self.states(job)

    def poll(self, holds: Any, what: str, seconds: float = 300, every: float = 0.5) -> None:
        """Waits until `holds()`; AssertionError with every log if it takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}\n{self.logs()}"
            time.sleep(every)

    def processes(self, job: int | None = None, rank: int | None = None, word: str = "") -> list[int]:
        """Processes on this machine that a job of this cluster started (of one rank, with `word` in the command)."""
        wanted = {f"SLURM_CONF={self.env['SLURM_CONF']}"}
        wanted |= {f"SLURM_JOB_ID={job}"} if job is not None else set()
        wanted |= {f"SLURM_PROCID={rank}"} if rank is not None else set()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                has = set((folder / "environ").read_text(errors="replace").split("\0"))
                command = (folder / "cmdline").read_text(errors="replace")
                if wanted <= has and word in command and any(name.startswith("SLURM_JOB_ID=") for name in has):
                    found.append(int(folder.name))
        return found

    def logs(self, lines: int = 60) -> str:
        """The ends of the daemons' logs and of every job's output."""
        files = [
            *sorted(self.root.glob("*.log")),
            *sorted(self.root.glob("*.out")),
            *sorted(self.root.glob("jobs/**/*.out")),
        ]
        parts = [f"--- {path}\n" + "\n".join(_tail(path, lines)) for path in files]
        return "\n".join(parts)


def _first_job(jobs: int = 40) -> int:
    """A job number from which on the rendezvous ports of the scripts, 15000 + number % 10000, are free here."""
    for first in range(1 + os.getpid() % 9000, 9900):
        with contextlib.ExitStack() as bound:
            try:
                for job in range(first, first + jobs):
                    bound.enter_context(socket.create_server(("127.0.0.1", 15000 + job)))
            except OSError:
                continue
            return first
    raise CannotStart("no free ports from 15000 to 24999")


def _tail(path: Path, lines: int) -> list[str]:
    # A progress bar writes its line again and again over itself.
    text = path.read_text(errors="replace").replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip()][-lines:]
