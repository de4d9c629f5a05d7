r"""Step time of a training run while its MLflow server is up, frozen, dead and up again; and what the server has then.

    python benchmarks/tracking.py --steps 60 --out runs/tracking

Tunes the mini world by pipeline/train.py, logging every step, beside a real `mlflow server` that is frozen (takes
connections, answers nothing) after a quarter of the steps, killed after half and started again after three quarters.
Prints the median and the quartiles of the step time of each quarter, and for each metric whether every step arrived
once. The numbers of one run on a busy machine differ from quarter to quarter by themselves: see the quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """`mlflow server` in a process group of its own, answering."""
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    words += ["--artifacts-destination", str(folder / "server_artifacts")]
    log = (folder / "server.log").open("ab")
    server = subprocess.Popen(words, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return server
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"mlflow server did not start: {folder / 'server.log'}")


def trained(run: Path) -> list[dict]:
    """The lines of metrics.jsonl so far that tell of a trained step; those of a checkpoint are lines of their own."""
    path = run / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [line for line in map(json.loads, whole.splitlines()) if "loss" in line["metrics"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps, a quarter in each state of the server")
    parser.add_argument("--out", type=Path, default=REPO / "runs/tracking", help="folder that must not exist yet")
    parser.add_argument("--port", type=int, default=15432, help="of the server, on 127.0.0.1")
    args = parser.parse_args()
    run, uri = args.out.resolve() / "run", f"http://127.0.0.1:{args.port}"
    if run.exists():
        parser.error(f"{args.out} holds an earlier measurement: remove it, or give another --out")
    run.mkdir(parents=True)
    server = start_server(run.parent, args.port)
    words = [sys.executable, str(REPO / "pipeline/train.py"), "--deepspeed", "ds_configs/z2.json", "--output_dir"]
    words += [str(run), "--max_steps", str(args.steps), "--logging_steps", "1", "--save_steps", "0"]
    log = (run.parent / "train.log").open("ab")
    training = subprocess.Popen(words, cwd=REPO, env={**os.environ, "MLFLOW_TRACKING_URI": uri}, stdout=log, stderr=log)
    quarter = args.steps // 4
    try:
        for part in (1, 2, 3):
            while len(trained(run)) < part * quarter and training.poll() is None:
                time.sleep(0.05)
            if part == 1:
                os.killpg(server.pid, signal.SIGSTOP)
            elif part == 2:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
            else:
                server = start_server(run.parent, args.port)
        if training.wait():
            raise SystemExit(f"training failed: {run.parent / 'train.log'}")
        # A short run may end before the server answers again: what is left is sent as a user would.
        subprocess.run([sys.executable, str(REPO / "pipeline/sync_mlflow.py"), str(run)], check=True)
        report(run, uri, quarter)
    finally:
        training.kill()
        os.killpg(server.pid, signal.SIGKILL)


def report(run: Path, uri: str, quarter: int) -> None:
    """Prints the step times, and how often each step's metrics are on the server."""
    import mlflow

    lines = trained(run)
    print(f"{'server':<10} {'steps':>9} {'median s/step':>14} {'quartiles':>16}")
    for part, state in enumerate(("up", "frozen", "dead", "up again")):
        # The first step of a run warms up caches.
        some = lines[max(1, part * quarter) : (part + 1) * quarter if part < 3 else None]
        seconds = [line["metrics"]["speed/seconds_per_step"] for line in some]
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(f"{state:<10} {some[0]['step']:>4}-{some[-1]['step']:<4} {middle:>14.3f} {low:>8.3f}-{high:.3f}")
    client = mlflow.MlflowClient(uri)
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    wrong = 0
    names = sorted({name for line in lines for name in line["metrics"]})
    for name in names:
        there = [metric.step for metric in client.get_metric_history(run_id, name)]
        wrong += there != [line["step"] for line in lines if name in line["metrics"]]
    print(f"{len(names)} metrics over {len(lines)} steps: {len(names) - wrong} are there with every step once")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
