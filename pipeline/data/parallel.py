"""Runs jobs in several processes, with a progress bar that moves within each job.

The processes are spawned, not forked: a fork copies other threads' locks in mid-air. They leave on their own when their
parent is killed, since one left alone would write into the files of the next run.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_sentinel
from typing import Any, TypeVar

Job = TypeVar("Job")
Count = Callable[[int], Any]

_counter: Any = None


def run_jobs(function: Callable[[Job, Count], None], jobs: Iterable[Job], *, workers: int, bar: Any) -> None:
    """`function(job, count)` for every job; `count(n)` moves the bar. A job's error is raised here and ends the rest.

    `jobs` may be a generator: it is asked for a job only when a process will soon be free, so that the jobs need not be
    in memory all at once. `function` must be a module's own function, jobs must be picklable.
    """
    spawn = multiprocessing.get_context("spawn")
    counter = spawn.Value("q", 0)
    shown = 0
    todo = iter(jobs)
    running: set[Future[None]] = set()
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(counter,)) as pool:
        try:
            while True:
                while len(running) < workers + 1 and (job := next(todo, None)) is not None:
                    running.add(pool.submit(_run_counted, function, job))
                if not running:
                    break
                done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                counted = counter.value
                if counted > shown:
                    bar.update(counted - shown)
                    shown = counted
        except BrokenProcessPool:
            raise ValueError(
                "a packing process died, most likely for lack of memory: run again with fewer --workers; "
                "finished shards are kept"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    # Ctrl-C reaches the whole process group; the parent ends the pool, with one message instead of many tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_sentinel([parent.sentinel])
    os._exit(1)


def _run_counted(function: Callable[[Any, Count], None], job: Any) -> None:
    def count(n: int) -> None:
        with _counter.get_lock():
            _counter.value += n

    function(job, count)
