"""ablate.py: which runs a study has, how it goes on, its table, and one row run for real in the mini world."""

from __future__ import annotations

import fcntl
import json
import shutil
import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import ablate
from pipeline.assembly import ablation, studies
from pipeline.assembly.ablation import Ablation
from pipeline.config import AblationArguments, DataArguments, ModelArguments, TrainArguments, parse
from pipeline.scoring.ablation_table import COLUMNS, compare, figures
from pipeline.scoring.scores import SCORES

STUDIES = ("table3", "table4", "table5", "learning_rates")
Ran = list[list[str]]
# What a report says of its run.
RUN = {"samples": 4, "seconds": {}, "versions": {}, "split": "test", "protocol": "free-running", "checkpoint": "c"}


def value_of(train: Sequence[str]) -> float:
    """A score that depends on a run's flags: .5 more with --beta 1, .01 for each seed."""
    return 0.1 + 0.5 * ("--beta" in train and train[train.index("--beta") + 1] == "1") + 0.01 * seed_of(train)


def seed_of(train: Sequence[str]) -> int:
    return int(train[train.index("--seed") + 1])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """The commands of an ablation, which leave a report instead of running."""
    commands: Ran = []

    def fake(words: Sequence[str], log: Path) -> None:
        commands.append(list(words))
        if "--checkpoint" in words:
            train = json.loads((log.parent / "job.json").read_text())["train"]
            tuned = dict.fromkeys(SCORES, value_of(train)) | {"caption_cider": None}
            (log.parent / "report.json").write_text(json.dumps({"tuned": tuned, "run": RUN}))

    monkeypatch.setattr(ablation, "_command", fake)
    monkeypatch.setattr(Ablation, "_parent_run", lambda self: "parent-id")
    monkeypatch.setattr(Ablation, "_close_parent", lambda self: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite://")
    return commands


def trained(ran: Ran) -> Ran:
    return [words for words in ran if "--checkpoint" not in words]


@pytest.mark.parametrize("study", STUDIES)
def test_every_row_is_a_command_line_that_train_takes(study: str) -> None:
    found = studies.make_study(study, Path("runs") / study)
    settings = set()
    for row in found.rows:
        # Of a study's rows no two may be the same run.
        parsed = parse(ModelArguments, DataArguments, TrainArguments, argv=list(row.flags))
        settings.add(repr(parsed))
    assert len(settings) == len(found.rows) == len({row.name for row in found.rows})


def test_runs_every_row_at_every_seed_once(tmp_path: Path, ran: Ran) -> None:
    args = AblationArguments(study="table3", rows="full,no_sparsity", seeds="0,2", output_dir=str(tmp_path / "study"))
    text = Ablation(args).run()
    assert [(words[2], seed_of(words)) for words in trained(ran)] == [
        ("--seed", 0),
        ("--beta", 0),
        ("--seed", 2),
        ("--beta", 2),
    ]
    assert all(words[-2:] == ["--mlflow_parent", "parent-id"] for words in trained(ran))
    assert "lower than *all* by more than two standard errors" in text
    line = next(line for line in text.splitlines() if line.startswith("| without sparsity"))
    assert line.count("0.610 ± 0.014 ▲") == len(COLUMNS) - 1
    assert "▲" not in next(line for line in text.splitlines() if line.startswith("| all"))
    assert line.endswith("| 2 |")
    assert "CIDEr" not in text
    assert (tmp_path / "study/table.md").read_text() == text
    assert f"{0.61}" in (tmp_path / "study/table.csv").read_text()
    before = len(ran)
    assert Ablation(args).run() == text
    assert len(ran) == before


@pytest.mark.parametrize(
    "values, said",
    [
        ((1.0, 2.0, 3.0), "same"),
        # Beside 1, 2, 3: both deviations are 1, so that two standard errors are 2 sqrt(2/3) = 1.633.
        ((2.6, 3.6, 4.6), "same"),
        ((2.7, 3.7, 4.7), "higher"),
        ((-0.7, 0.3, 1.3), "lower"),
        ((9.0,), None),
        (None, None),
    ],
)
def test_a_difference_is_two_standard_errors(values: tuple[float, ...] | None, said: str | None) -> None:
    def found(values: tuple[float, ...] | None) -> dict[str, Any] | None:
        return (
            figures([{"tuned": dict.fromkeys(SCORES, value)} for value in values])["referring_miou"] if values else None
        )

    assert compare(found(values), found((1.0, 2.0, 3.0))) == said


def test_goes_on_where_it_was(tmp_path: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    args = AblationArguments(study="table5", seeds="0", output_dir=str(tmp_path / "study"))
    whole = ablation._command

    def broken(words: Sequence[str], log: Path) -> None:
        if "level" in words:
            raise RuntimeError("train.py ended with 1")
        whole(words, log)

    monkeypatch.setattr(ablation, "_command", broken)
    with pytest.raises(RuntimeError, match="ended with 1"):
        Ablation(args).run()
    assert [words[3] for words in trained(ran)] == ["gaussian", "top2beta"]
    monkeypatch.setattr(ablation, "_command", whole)
    text = Ablation(args).run()
    assert [words[3] for words in trained(ran)] == ["gaussian", "top2beta", "level", "distribution"]
    assert "4 of 4 runs" in text


def test_parts_share_the_runs_and_the_table(tmp_path: Path, ran: Ran) -> None:
    names = []
    for part in ("1/3", "2/3", "3/3"):
        args = AblationArguments(study="table4", seeds="0", output_dir=str(tmp_path / "study"), part=part)
        names += [job.folder for job in Ablation(args).own_jobs()]
        text = Ablation(args).run()
    assert len(names) == len(set(names)) == 20
    assert "20 of 20 runs" in text
    grid = text.split("## referring segmentation: mIoU")[1].split("##")[0]
    assert "| | 1 task | 2 tasks | 3 tasks | 4 tasks |" in grid
    # Of one seed there is no deviation, and no difference that could be told.
    assert "| β = 1 | 0.600 |" in grid
    assert "| β = 0.4 | 0.100 |" in grid
    # Columns stand in the study's order, whichever row was finished first.
    some = AblationArguments(
        study="table4", rows="beta0.2_tasks4,beta0.4_tasks1", seeds="0", output_dir=f"{tmp_path}/s"
    )
    assert "| | 1 task | 4 tasks |" in Ablation(some).run()
    few = AblationArguments(study="table4", rows="beta1_tasks1", seeds="0", output_dir=str(tmp_path / "study"))
    assert Ablation(few).run() == text


def test_other_flags_in_the_same_folder_are_refused(tmp_path: Path, ran: Ran) -> None:
    def start(flags: str) -> str:
        return Ablation(
            AblationArguments(
                study="table3", rows="full", seeds="0", output_dir=str(tmp_path / "study"), train_flags=flags
            )
        ).run()

    start("--max_steps 2")
    with pytest.raises(ValueError, match="run with other flags"):
        Ablation(
            AblationArguments(study="table3", seeds="0", output_dir=str(tmp_path / "study"), table_only=True)
        ).table()
    with pytest.raises(ValueError, match="run with other flags"):
        start("--max_steps 3")


def test_a_run_of_the_same_settings_is_taken_from_a_sister_study(tmp_path: Path, ran: Ran) -> None:
    """Table 5's gaussian row is Table 3's whole, since gaussian is the default; so is its learning rate's."""

    def start(study: str, rows: str, **flags: str) -> str:
        folder = str(tmp_path / study)
        return Ablation(AblationArguments(study=study, rows=rows, seeds="0", output_dir=folder, **flags)).run()

    start("table3", "full")
    text = start("table5", "gaussian,level")
    assert [words[3] for words in trained(ran)[1:]] == ["level"]
    link = tmp_path / "table5/gaussian/seed0"
    assert link.is_symlink() and link.resolve() == tmp_path / "table3/full/seed0"
    assert "2 of 4 runs" in text
    rates_table(tmp_path, {"neural": "0.004"})
    start("baselines", "neural")
    assert len(trained(ran)) == 2
    # Scored otherwise, or tuned otherwise: runs of their own.
    start("learning_rates", "neural_0.008")
    start("table4", "beta0.4_tasks4", eval_flags="--limit 3")
    assert len(trained(ran)) == 4
    shutil.rmtree(tmp_path / "table3")
    start("table5", "gaussian,level")
    assert len(trained(ran)) == 5
    assert not link.is_symlink() and (link / "report.json").is_file()


def rates_table(
    parent: Path, best: dict[str, str], lacking: dict[str, Sequence[str]] | None = None, **keys: Any
) -> Path:
    """learning_rates/table.json with a higher mean at each tuner's best rate. lacking: row -> scores it is without."""
    rows = {}
    for row in studies.make_study("learning_rates", parent / "learning_rates").rows:
        tuner, _, rate = row.name.partition("_")
        score = {"mean": 0.5 if rate == best.get(tuner, "0.001") else 0.4, "std": 0.0, "values": [0.5]}
        without = (lacking or {}).get(row.name, (lacking or {}).get("every row", ()))
        rows[row.name] = {"scores": {name: None if name in without else score for name in SCORES}}
    table = parent / "learning_rates" / "table.json"
    table.parent.mkdir(exist_ok=True)
    table.write_text(json.dumps({"rows": rows, **keys}))
    return table


def test_baselines_take_the_best_rate_of_the_validation_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run the study learning_rates first"):
        studies.make_study("baselines", tmp_path / "baselines")
    rates_table(tmp_path, {"neural": "0.004", "ia3": "0.016"})
    study = studies.make_study("baselines", tmp_path / "baselines")
    assert {row.name: row.flags[2:] for row in study.rows} == {
        "neural": ("--lr_sparse", "0.004"),
        "lora": ("--lr_adapter", "0.001"),
        "ia3": ("--lr_adapter", "0.016"),
    }
    assert "by the mean of referring_miou, reasoning_miou, caption_object_f1, picture_text_r1_of_50 on" in study.note


def test_rates_are_chosen_by_the_scores_that_there_are(tmp_path: Path) -> None:
    """A data set of real photographs has no named objects, and pictures need a prior."""
    real = ["caption_object_f1", "picture_text_r1_of_50"]
    table = rates_table(tmp_path, {"lora": "0.002"}, {"every row": real})
    rows = json.loads(table.read_text())
    # A tenth of CIDEr counts: .1 more in mIoU is more than .9 in CIDEr, and less than 1.1.
    for cider, best in ((0.9, "0.002"), (1.1, "0.008")):
        rows["rows"]["lora_0.008"]["scores"]["caption_cider"] = {"mean": 0.4 + cider}
        rows["rows"]["lora_0.002"]["scores"] |= {name: {"mean": 0.4} for name in ("reasoning_miou", "caption_cider")}
        table.write_text(json.dumps(rows))
        study = studies.make_study("baselines", tmp_path / "baselines")
        assert study.rows[1].flags[-1] == best
        assert "of referring_miou, reasoning_miou, caption_cider x 0.1 on" in study.note


@pytest.mark.parametrize(
    "lacking, message",
    [
        ({"lora_0.002": ["reasoning_miou"]}, "lacks reasoning_miou of lora_0.002, which other rows have"),
        ({"ia3_0.001": ["caption_object_f1"]}, "lacks caption_object_f1 of ia3_0.001, which other rows have"),
        ({"every row": list(SCORES)}, "has none of referring_miou, .*finish the study learning_rates first"),
    ],
)
def test_rates_need_a_score_of_every_row(lacking: dict[str, Sequence[str]], message: str, tmp_path: Path) -> None:
    rates_table(tmp_path, {}, lacking)
    with pytest.raises(ValueError, match=message):
        studies.make_study("baselines", tmp_path / "baselines")


def test_rates_chosen_with_other_flags_are_refused(tmp_path: Path, ran: Ran) -> None:
    def start(study: str, rows: str, **flags: str) -> str:
        folder = str(tmp_path / study)
        return Ablation(AblationArguments(study=study, rows=rows, seeds="0", output_dir=folder, **flags)).run()

    start("learning_rates", "", train_flags="--max_steps 2", eval_flags="--limit 3")
    text = start("baselines", "neural", train_flags="--max_steps  2", eval_flags="--limit 3")
    assert "Each learning rate is the best by the mean of referring_miou" in text
    for flags in ({"train_flags": "--max_steps 3"}, {"train_flags": "--max_steps 2", "eval_flags": "--limit 4"}):
        with pytest.raises(ValueError, match=r"made with --\w+_flags '--\w+ \d', baselines with '--\w+ \d'"):
            start("baselines", "neural", **flags)


@pytest.mark.parametrize("content", ["[]", '{"rows": {', '{"rows": [1]}', '{"rows": {"neural_0.001": 3}}', "7"])
def test_a_damaged_table_of_rates_is_named(content: str, tmp_path: Path) -> None:
    rates_table(tmp_path, {}).write_text(content)
    with pytest.raises(ValueError, match=r"learning_rates/table\.json (is damaged|has none of)"):
        studies.make_study("baselines", tmp_path / "baselines")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("report.json", '{"tuned": {"refer', r"report\.json is damaged .*remove it"),
        ("report.json", "{}", r"report\.json is no whole report \(run is no object\): remove it"),
        ("job.json", '{"train": [', r"job\.json is damaged .*remove the folder"),
        ("job.json", "[]", r"job\.json is damaged .*remove the folder"),
    ],
)
def test_damaged_records_of_a_run_are_named(name: str, content: str, message: str, tmp_path: Path, ran: Ran) -> None:
    args = AblationArguments(study="table3", rows="full", seeds="0", output_dir=str(tmp_path / "study"))
    Ablation(args).run()
    (tmp_path / "study/full/seed0" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Ablation(args).run()


def test_a_report_of_before_a_score_existed(tmp_path: Path, ran: Ran) -> None:
    args = AblationArguments(study="table3", rows="full", seeds="0", output_dir=str(tmp_path / "study"))
    Ablation(args).run()
    path = tmp_path / "study/full/seed0/report.json"
    report = json.loads(path.read_text())
    del report["tuned"]["picture_is"]
    path.write_text(json.dumps(report))
    assert "| all |" in Ablation(args).table()
    row = json.loads((tmp_path / "study/table.json").read_text())["rows"]["full"]
    assert row["scores"]["picture_is"] is None and row["scores"]["referring_miou"]["mean"] == 0.1


def test_a_part_without_a_run_has_nothing_to_do(
    tmp_path: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ablate.py", "table5", "--part", "13/20", "--output_dir", str(tmp_path / "study")]
    monkeypatch.setattr(sys, "argv", words)
    assert ablate.main() == 0
    assert capsys.readouterr().out == "--part 13/20 has nothing to do: table5 has 12 runs.\n"
    assert not ran


def test_one_part_writes_the_table_at_a_time(tmp_path: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    write, held = ablation.write_table, []

    def writes(folder: Path, *words: Any, **more: Any) -> str:
        with (folder / "parent.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(folder)
        return write(folder, *words, **more)

    monkeypatch.setattr(ablation, "write_table", writes)
    Ablation(AblationArguments(study="table3", rows="full", seeds="0", output_dir=str(tmp_path))).run()
    assert held == [tmp_path]


def test_an_output_dir_that_is_a_file_is_one_message(
    tmp_path: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study").write_text("")
    monkeypatch.setattr(sys, "argv", ["ablate.py", "table5", "--output_dir", str(tmp_path / "study")])
    assert ablate.main() == 2
    assert capsys.readouterr().err == (
        f"ablate.py: error: {tmp_path}/study cannot be made a folder (File exists): name another\n"
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"rows": "ful"}, "--rows names ful; table3 has full"),
        ({"seeds": "0,0"}, "seeds takes numbers, once each"),
        ({"part": "4/3"}, "--part is i/n"),
        ({"train_flags": '"'}, "train_flags is no command line"),
        *(
            ({name: f"--limit 2 {flag}"}, f"--{name} may not hold {flag.split('=')[0].split()[0]}: ")
            for name, flags in (
                (
                    "eval_flags",
                    ("--split valid", "--report-dir=x", "--checkpoint c", "--from p", "--tables a", "--summarise=a,b"),
                ),
                ("train_flags", ("--output-dir x", "--output_dir=x", "--seed 3", "--run_name me")),
            )
            for flag in flags
        ),
    ],
)
def test_wrong_flags(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Ablation(AblationArguments(output_dir=str(tmp_path), **flags)).own_jobs()


def test_a_row_for_real(tmp_path: Path, run_python: Callable[..., Any], repo: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "study"
    small = ["--mini_train", "8", "--mini_valid", "0", "--mini_test", "4", "--workers", "1"]
    packed = run_python(repo / "pipeline/shard_mmud.py", "--out", shards, *small)
    assert packed.returncode == 0, packed.stderr
    done = run_python(
        repo / "pipeline/ablate.py",
        *("table3", "--rows", "no_ema", "--seeds", "1", "--output_dir", out),
        *("--train_flags", f"--data {shards} --global_batch 4 --max_steps 2 --num_workers 0"),
        *("--eval_flags", "--limit 2 --max_new_tokens 8"),
        env={"MLFLOW_TRACKING_URI": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "| without EMA |" in done.stdout
    state = json.loads((out / "no_ema/seed1/checkpoint-2/state.json").read_text())
    assert state["config"]["ModelArguments"]["alpha"] == 0
    with sqlite3.connect(out / "mlflow.db") as database:
        parents = dict(database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
        statuses = dict(database.execute("select run_uuid, status from runs"))
    (child,), (parent,) = parents, parents.values()
    assert statuses == {child: "FINISHED", parent: "FINISHED"}
