"""Runs scripts one after another in one process, for tests: `python tests/scripts_job.py JOBS.json OUT.json`.

A start costs seconds of imports, which this pays once. DeepSpeed cannot start a second process group in a process, so
the first one stays until the end. JOBS: [{"name", "script", "args"}] with "env", if wanted, which
also has the path of the sparse kernels logged; a script runs as
`python pipeline/<script> args` would, in one process. OUT: {name: {"code", "out", "err"}}.
"""

import contextlib
import io
import json
import logging
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.runtime import engine

PIPELINE = Path(__file__).resolve().parent.parent / "pipeline"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run(script: str, args: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Exit code, stdout and stderr of one script."""
    os.environ.update(env)
    for name in LAUNCHER:
        os.environ.pop(name, None)
    sys.argv = [str(PIPELINE / script), *args]
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if env:
            logging.basicConfig(stream=err, format="%(message)s", force=True)
            logging.getLogger("sparse_kernels").setLevel(logging.INFO)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
            if isinstance(code, str):
                code = print(code, file=sys.stderr) or 1
        except BaseException:
            traceback.print_exc()
            code = 1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def main() -> None:
    """All jobs in order; what is done so far is on disk after each."""
    jobs, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    sys.path[0] = str(PIPELINE)
    done: dict[str, Any] = {}
    end, dist.destroy_process_group = dist.destroy_process_group, lambda group=None: None
    leave, engine.leave = engine.leave, sys.exit
    for job in jobs:
        done[job["name"]] = run(job["script"], job["args"], job.get("env", {}))
        target.write_text(json.dumps(done, indent=1))
    if dist.is_initialized():
        end()
    leave(0)


if __name__ == "__main__":
    main()
