"""The preflight: what it finds, all at once, and what it leaves to pass."""

from __future__ import annotations

import dataclasses
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_plan import plan_of, zero_of
from tiny_run import CLIP, REPO, clip_file, llama

from pipeline.assembly import preflight
from pipeline.assembly.preflight import GIB, Findings
from pipeline.config import DataArguments, ModelArguments, TrainArguments, parse
from pipeline.model.weight_files import check_folder
from pipeline.planning.gpus import GPUS
from pipeline.planning.memory import states, usable
from pipeline.planning.search import Choice
from pipeline.runtime import stopping
from pipeline.runtime.ranks import Ranks, free_port
from sparse_kernels import launch


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preflight")
    llama(root / "llama")
    clip_file(root / "clip.safetensors")
    return root


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy of the LLaMA folder, to be damaged."""
    return Path(shutil.copytree(made / "llama", tmp_path / "llama"))


def look(made: Path, packed: Path, out: Path, world: int = 1, **changed: Any) -> Findings:
    """What rank 0 of `world` finds with all in order but for `changed`."""
    kinds: dict[str, Any] = {"ModelArguments": {}, "DataArguments": {}, "TrainArguments": {}}
    values = {"base": str(made / "llama"), "clip": CLIP, "clip_weights": str(made / "clip.safetensors")}
    values |= {"data": str(packed), "output_dir": str(out), "global_batch": 4, "bf16": "false"} | changed
    for kind in (ModelArguments, DataArguments, TrainArguments):
        own = {name: value for name, value in values.items() if name in kind.__dataclass_fields__}
        kinds[kind.__name__] = kind(**own)
    found = Findings("n1")
    preflight.examine(found, *kinds.values(), Ranks(0, 0, world, torch.device("cpu")))
    return found


def test_nothing_is_said_when_all_is_there(made: Path, packed: Path, tmp_path: Path) -> None:
    found = look(made, packed, tmp_path / "new" / "run")
    assert found.problems == [] and found.warnings == []
    files = [*(made / "llama").glob("*.safetensors"), made / "clip.safetensors"]
    held = sum(tensor.numel() for path in files for tensor in load_file(path).values())
    # All weights in fp32, and 16 bytes besides for each that is trained.
    assert 4 * held < found.fixed < 6 * held
    # It looks and leaves nothing behind.
    assert not (tmp_path / "new").exists()


def test_every_problem_is_listed_at_once(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "z.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "gradient_cliping": 1.0}')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    model = ModelArguments(base=str(tmp_path / "no-llm"), clip="ViT-L-14-quickgelu", clip_weights="no-clip")
    data = DataArguments(data=f"{tmp_path}/a,{tmp_path}/b")
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="5 things to mend before this run can start") as error:
        preflight.check(model, data, TrainArguments(output_dir=str(tmp_path), deepspeed=str(file)), ranks)
    lines = str(error.value).splitlines()
    assert [line[:5] for line in lines[1:]] == ["  1. ", "  2. ", "  3. ", "  4. ", "  5. "]
    for number, words in enumerate(["no-llm", "no-clip", f"{tmp_path}/a", f"{tmp_path}/b", "gradient_cliping"], 1):
        assert words in lines[number], lines
    said = capsys.readouterr().out
    assert said.count("warning: MLFLOW_TRACKING_URI") == 1 and "does not answer" in said


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"micro_batch": 3}, "--global_batch"),
        ({"clip": "ViT-L-99"}, "ViT-L-99 is no model that open_clip knows"),
        ({"eval_steps": 2}, "--eval_steps 2 needs a split 'valid'"),
        ({"liger": True}, "--liger true runs on a GPU only"),
        ({"compile_layers": True, "deepspeed": str(REPO / "ds_configs/z3.json")}, "does not work with ZeRO-3"),
        ({"attn": "flash_attention_2"}, "--attn flash_attention_2 trains on a GPU only"),
        ({"first_tuned_layer": 9}, "--first_tuned_layer 9: the LM has"),
        ({"output_dir": "/proc/nothing"}, "/proc cannot be written"),
    ],
)
def test_what_is_wrong_with_one_flag(
    made: Path, packed: Path, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    (problem,) = look(made, packed, tmp_path, **changed).problems
    assert words in problem


def test_weights_that_are_not_whole(made: Path, packed: Path, model: Path, tmp_path: Path) -> None:
    def problem(**changed: Any) -> str:
        (said,) = look(made, packed, tmp_path / "run", base=str(model), **changed).problems
        return said

    files = sorted(model.glob("*.safetensors"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-1])
    assert f"{files[1]} is cut off" in problem()
    files[1].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS pointer" in problem()
    files[1].unlink()
    assert f"the index names {files[1].name}, not in the folder" in problem()
    files[1].write_bytes(whole)
    tensors = load_file(files[1])
    lost = next(iter(tensors))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost} | {"x": torch.ones(1)}, files[1])
    assert f"lacks tensors that the index names, such as {lost}" in problem()
    files[1].write_bytes(whole)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 8}))
    lost = "model.layers.4.input_layernorm.weight"
    assert "its files lack tensors that config.json describes" in problem() and lost in problem()
    (model / "config.json").write_text(json.dumps(config))
    check_folder(model)
    (model / "model.safetensors.index.json").write_text("{")
    assert "is no index of weights" in problem()
    for path in model.glob("model*"):
        path.unlink()
    assert "holds no *.safetensors" in problem()


def test_a_folder_without_tokenizer(made: Path, packed: Path, model: Path, tmp_path: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    (problem,) = look(made, packed, tmp_path / "run", base=str(model)).problems
    assert "the tokenizer does not load" in problem and "\n" not in problem


def test_a_clip_that_is_cut_off(made: Path, packed: Path, tmp_path: Path) -> None:
    cut = tmp_path / "clip.safetensors"
    cut.write_bytes((made / "clip.safetensors").read_bytes()[:-100])
    (problem,) = look(made, packed, tmp_path / "run", clip_weights=str(cut)).problems
    assert f"{cut} is cut off" in problem


def test_gpus_that_torch_does_not_see(
    made: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    (problem,) = look(made, packed, tmp_path).problems
    assert "SLURM gave this job 8 GPU(s) per node" in problem


def test_disk_space(made: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=int(0.4 * GIB)))
    (problem,) = look(made, packed, tmp_path).problems
    assert "0.4 GiB are free, but 3 checkpoints of" in problem
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=int(0.6 * GIB)))
    assert look(made, packed, tmp_path).problems == []
    # 1000 checkpoints of some 20 MB.
    found = look(made, packed, tmp_path, save_total_limit=0, save_steps=1, max_steps=1000)
    assert found.problems == [] and "1000 checkpoints" in found.warnings[0]


def test_the_memory_of_13b_against_known_sizes() -> None:
    """plan.py's own figures; test_plan.py holds them against a real DeepSpeed engine."""
    asked = plan_of("--preset", "13b")

    def fixed(file: str, ranks: int, quant: str = "none") -> Any:
        return states(asked.count, zero_of(file, 1, ranks, 24), quant=quant)

    assert 24.2 * GIB < fixed("z2", 8).fixed < 25.5 * GIB
    assert preflight.memory_problems(fixed("z2", 8), 80 * GIB) == []
    (problem,) = preflight.memory_problems(fixed("z2", 4), 24 * GIB)
    assert "ds_configs/z3.json" in problem and "has 24" in problem
    assert preflight.memory_problems(fixed("z3", 4), 24 * GIB) == []
    # 13B in 4 bits fits a 24 GB card whole.
    assert preflight.memory_problems(fixed("z2", 4, "nf4"), 24 * GIB) == []
    assert fixed("z3", 4).fixed < fixed("z2", 4).fixed / 3
    assert fixed("z3_offload", 4).fixed < 1 * GIB

    memory = asked.memory(zero_of("z2", 2, 8, 16), 2)
    assert memory.clip > 1.5 * GIB and memory.activations < 1.5 * GIB
    assert memory.fixed < memory.total < 40 * GIB
    assert preflight.memory_warnings(memory, 79 * GIB) == []
    (warning,) = preflight.memory_warnings(memory, memory.total)
    assert "it may run out of memory" in warning and "--gradient_checkpointing full" in warning


def planned_rows() -> list[list[str]]:
    """Cells of the planner's table in slurm/README.md: preset, machine, file, flags, GiB, seconds, hours."""
    text = (REPO / "slurm/README.md").read_text()
    lines = text.partition("### What the planner takes")[2].partition("\n## ")[0].splitlines()
    return [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith(("| 13b", "| 7b"))
    ]


@pytest.mark.parametrize("row", planned_rows(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_preflight_accepts_what_the_planner_takes(
    made: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: list[str]
) -> None:
    preset, machine, file, flags = row[:4]
    words = ["--preset", preset, "--base", str(made / "llama"), "--clip", CLIP, "--data", str(packed), *flags.split()]
    words += ["--clip_weights", str(made / "clip.safetensors"), "--output_dir", str(tmp_path)]
    words += ["--deepspeed", str(REPO / "ds_configs" / file.split("`")[1]), "--gradient_checkpointing", "none"]
    found = Findings("n1")
    ranks = Ranks(0, 0, int(machine.split()[0]), torch.device("cpu"))
    # DeepSpeed counts the ranks itself while it reads its file.
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_rank", lambda *_: 0)
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_world_size", lambda *_: ranks.world_size)
    preflight.examine(found, *parse(ModelArguments, DataArguments, TrainArguments, argv=words), ranks)
    assert found.problems == []


def test_the_planners_table_of_13b_is_what_it_says() -> None:
    asked = plan_of("--preset", "13b", "--gradient_checkpointing", "none", "--packing", "true")
    rows = [row for row in planned_rows() if row[0] == "13b"]
    assert {row[1] for row in rows} == {"4 x 4090", "3 x A100-80", "8 x A100-80", "1 x H200"}
    for _, machine, file, flags, gib, seconds, hours in rows:
        ranks, gpu = machine.split(" x ")
        _, _, train = parse(ModelArguments, DataArguments, TrainArguments, argv=["--preset", "mini", *flags.split()])
        quant = "nf4" if "nf4" in flags else "none"
        choice = Choice(
            file=file.split("`")[1].removesuffix(".json"),
            micro_batch=train.micro_batch,
            checkpointing="none",
            quant=quant,
        )
        planner = dataclasses.replace(
            asked.planner,
            gpu=GPUS[gpu],
            workload=dataclasses.replace(asked.workload, global_batch=train.global_batch),
        )
        plan = planner.plan(choice, zero_of(choice.file, choice.micro_batch, int(ranks), train.global_batch))
        assert plan.fits
        there = usable(plan.gpu.memory) / GIB
        assert gib == f"{plan.memory.total / GIB:.1f} of {there:.1f}", machine
        assert (seconds, hours) == (f"{plan.time.total:.3f}", f"{plan.hours:.1f}"), machine
        assert f"| {gib} | {seconds} | {plan.mfu:.0%} |".replace("%", " %") in (REPO / "docs/plans.md").read_text()


def test_ranks_of_a_node_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [Findings("n1", fixed=10 * GIB), Findings("n1"), Findings("n2", fixed=10 * GIB), Findings("n2")]
    assert preflight.host_memory_problems(two, 21 * GIB) == []
    (problem,) = preflight.host_memory_problems(two, 19 * GIB)
    assert "2 rank(s) take 20 GiB of the node's 19" in problem
    for found, gpu in zip(two, ("a", "a", "a", "b"), strict=True):
        found.gpu = gpu
    (problem,) = preflight.shared_gpus(two)
    assert problem.startswith("ranks 0, 1 share one GPU on n1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1024")
    assert preflight._node_bytes() == GIB


def test_what_only_some_nodes_say_bears_their_names() -> None:
    everyone = [Findings("n1", ["a", "b"]), Findings("n2", ["b"]), Findings("n2"), Findings("n3", ["b"])]
    assert preflight._merge(everyone, "problems") == ["on n1: a", "b"]


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A web server that knows nothing, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_address[1]}/", asked
        web.shutdown()


@pytest.mark.parametrize(
    "environment, flags, built, words",
    [
        ("", {}, subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]), "apt install python3-dev gcc"),
        ("triton", {}, RuntimeError("Failed to find C compiler.\nAnd more"), "(Failed to find C compiler.)"),
        ("", {}, None, ""),
        ("reference", {}, RuntimeError("never asked"), ""),
        ("", {"tuner": "lora"}, RuntimeError("never asked"), ""),
    ],
)
def test_a_gpu_where_triton_cannot_start_kernels(
    monkeypatch: pytest.MonkeyPatch, environment: str, flags: dict[str, Any], built: Exception | None, words: str
) -> None:
    """Without Python.h the first forward would end, after the model is loaded."""

    def driver() -> object:
        if built is not None:
            raise built
        return object()

    monkeypatch.setenv("SPARSE_KERNELS", environment)
    monkeypatch.setattr(launch, "driver", driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    found = Findings("n1")
    ranks = Ranks(0, 0, 1, torch.device("cuda", 0))
    preflight._gpu(found, ModelArguments(**flags), TrainArguments(bf16="false"), ranks)
    assert found.gpu == "GPU-1" and bool(found.problems) == bool(words)
    assert all(words in problem and "SPARSE_KERNELS=reference" in problem for problem in found.problems)


def test_an_mlflow_server_that_answers_anything_is_there(server: tuple[str, list[str]]) -> None:
    uri, asked = server
    assert preflight.mlflow_warnings(uri) == []
    assert asked == ["/health"]
    assert preflight.mlflow_warnings("sqlite:///x.db") == preflight.mlflow_warnings("") == []
    assert "does not answer" in preflight.mlflow_warnings("http://host.invalid:5000")[0]


def test_signals_are_watched_from_the_outermost_context_on() -> None:
    import os
    import signal

    with stopping.watching() as outer:
        os.kill(os.getpid(), signal.SIGUSR2)
        with stopping.watching() as inner:
            assert inner and inner.name == "SIGUSR2" and inner is outer
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.name == "SIGTERM"
    with stopping.watching() as fresh:
        assert not fresh
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
