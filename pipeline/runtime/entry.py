"""How an entry script runs on its ranks: process group, signals, one message for a failure, exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pipeline.runtime import engine
from pipeline.runtime.faults import explain
from pipeline.runtime.ranks import Ranks, detect, tell_failure
from pipeline.runtime.stopping import watching


def run_ranks(script: str, work: Callable[[Ranks], object], *, hang_timeout: float) -> int:
    """Starts the process group, calls work(ranks), ends the group; returns the exit status.

    An error is told once, by the first rank that meets it; what a user can mend is one message. hang_timeout: seconds,
    of --hang_timeout; collective calls wait at least twice as long.
    """
    ranks, whole = None, False
    # Signals are watched until the message is out: the launcher sends SIGTERM as soon as one rank has failed.
    with watching():
        try:
            ranks = detect()
            engine.start(ranks, timeout_minutes=max(30.0, 2.0 * hang_timeout / 60.0))
            work(ranks)
            whole = True
            return 0
        except Exception as error:
            text, status = explain(error, script)
            tell_failure(text)
            return status
        except KeyboardInterrupt:
            if ranks is None or ranks.is_main:
                print("\nStopped. --resume auto, the default, goes on from the newest checkpoint.", file=sys.stderr)
            return 130
        finally:
            # After a failure the others may sit in a collective call, for which NCCL's end would wait.
            if whole or ranks is None or ranks.device.type != "cuda":
                engine.close()
