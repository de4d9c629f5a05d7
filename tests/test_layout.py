"""The rules of the house, read from the sources with `ast`: who imports whom, names, docstrings, lengths, packages,
tree.

The README's tree is the first fenced code block under a heading that holds the word "tree" or "files". Each line of
it is `path   what it is`: a path relative to the root, at least two spaces, a description. Blank lines and lines that
begin with `#` are passed over. A path that ends in `/` stands for every tracked file below it. Every tracked file
must be covered, no path may stand there twice, and every line must cover at least one tracked file.
"""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools

REPO = Path(__file__).resolve().parent.parent
SOURCES = sorted([*REPO.glob("pipeline/**/*.py"), *REPO.glob("kernels/**/*.py")])
EVERY = sorted([*SOURCES, *REPO.glob("tests/*.py"), *REPO.glob("benchmarks/**/*.py"), REPO / "setup.py"])
# Modules directly in pipeline/ that are not scripts.
NOT_ENTRIES = {"__init__", "config"}
ENTRIES = sorted(path for path in REPO.glob("pipeline/*.py") if path.stem not in NOT_ENTRIES)

# dependency -> the only files or folders that may import it
DOORS = {
    "deepspeed": ["pipeline/runtime/engine.py"],
    "mlflow": ["pipeline/runtime/mlflow_store.py"],
    "fsspec": ["pipeline/data/storage.py"],
    "webdataset": ["pipeline/data/writer.py", "pipeline/data/reader.py"],
    "open_clip": ["pipeline/model/vision.py"],
    "taming": ["pipeline/model/vqgan.py"],
    "triton": ["kernels/sparse_kernels/"],
    "liger_kernel": ["pipeline/model/liger.py"],
    "pycocotools": ["pipeline/data/rle.py"],
    "pycocoevalcap": ["pipeline/scoring/"],
    "torchmetrics": ["pipeline/scoring/"],
    "gradio": ["pipeline/inference/page.py"],
    "torch_fidelity": ["pipeline/scoring/"],
}


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Every absolute name that the file imports anywhere, `from a.b import c` as both `a.b` and `a.b.c`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offenders(paths: list[Path], package: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """`file: name` for each import of `package` in `paths`, other than of what `allowed` names."""
    return [
        f"{relative(path)}: {name}"
        for path in paths
        for name in imports(path)
        if within(name, package) and not any(within(name, permitted) for permitted in allowed)
    ]


def below(folder: str) -> list[Path]:
    return sorted((REPO / folder).glob("**/*.py"))


def test_data_and_model_meet_in_batch_only() -> None:
    assert not offenders(below("pipeline/data"), "pipeline.model")
    # `from pipeline.data import batch` yields the bare package too, which would let anything through: it is refused.
    assert not offenders(below("pipeline/model"), "pipeline.data", ("pipeline.data.batch",))


def test_batch_stands_alone() -> None:
    path = REPO / "pipeline/data/batch.py"
    roots = {name.split(".")[0] for name in imports(path)} if path.exists() else set()
    assert roots <= sys.stdlib_module_names | {"torch"}, roots


def test_kernels_stand_alone() -> None:
    assert not offenders(below("kernels"), "pipeline")


def test_nothing_imports_an_entry_script() -> None:
    # ast shows no difference between an attribute and a module, so the entry's full name is what counts.
    assert not [bad for entry in ENTRIES for bad in offenders(SOURCES, f"pipeline.{entry.stem}")]


def test_config_is_read_by_entries_only() -> None:
    readers = [path for path in SOURCES if path not in ENTRIES and "pipeline/assembly/" not in relative(path)]
    assert not offenders(readers, "pipeline.config")
    outside = [path for path in SOURCES if "pipeline/settings/" not in relative(path) and path.name != "config.py"]
    assert not offenders(outside, "pipeline.settings")


@pytest.mark.parametrize("dependency", sorted(DOORS))
def test_one_door_per_dependency(dependency: str) -> None:
    outside = [
        path
        for path in SOURCES
        if not any(relative(path) == d or (d.endswith("/") and relative(path).startswith(d)) for d in DOORS[dependency])
    ]
    assert not offenders(outside, dependency)


def test_imports_are_absolute() -> None:
    relative_imports = [
        f"{relative(path)}:{node.lineno}"
        for path in EVERY
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative_imports
    siblings = {path.stem for path in REPO.glob("pipeline/*") if not path.stem.startswith(("_", "."))}
    assert not [
        f"{relative(path)}: {name}" for path in SOURCES for name in imports(path) if name.split(".")[0] in siblings
    ]


def test_script_names_hide_no_module(tmp_path: Path) -> None:
    stems = [path.stem for path in REPO.glob("pipeline/*.py") if path.stem != "__init__"]
    stems += [path.name for path in REPO.glob("pipeline/*/") if not path.name.startswith("__")]
    assert not set(stems) & sys.stdlib_module_names
    code = (
        "import importlib.util, json, sys; print(json.dumps([s for s in sys.argv[1:] if importlib.util.find_spec(s)]))"
    )
    # -I keeps the working folder and PYTHONPATH off sys.path.
    found = subprocess.run(
        [sys.executable, "-I", "-c", code, *stems], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout) == [], "these hide an installed module when a script of pipeline/ runs"


def test_taken_package_names_are_left_alone() -> None:
    assert not (REPO / "tests/__init__.py").exists(), "torch_fidelity installs a package `tests`"
    assert not (REPO / "kernels/__init__.py").exists(), "transformers probes a package `kernels`"


@pytest.mark.parametrize("path", EVERY, ids=relative)
def test_docstring_and_length(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)), "a module says in its docstring what it does"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, "split the file"


@pytest.mark.parametrize("path", ENTRIES, ids=relative)
def test_scripts_say_how_to_run_them(path: Path) -> None:
    assert relative(path) in (ast.get_docstring(tree_of(path)) or ""), "the docstring gives the command that runs it"


def test_setup_lists_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: said.update(arguments))
    runpy.run_path(str(REPO / "setup.py"))
    roots = {REPO: ["pipeline"], REPO / "kernels": ["sparse_kernels"]}
    folders = {
        ".".join(init.parent.relative_to(root).parts)
        for root, tops in roots.items()
        for top in tops
        for init in (root / top).glob("**/__init__.py")
    }
    assert sorted(said["packages"]) == sorted(folders)
    code = {".".join(path.relative_to(REPO).parent.parts) for path in REPO.glob("pipeline/**/*.py")}
    assert code <= set(said["packages"]), "a folder with code needs an __init__.py"


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name]


def readme_tree(text: str) -> list[str]:
    """The paths of the README's tree, as the module's docstring defines it."""
    lines = iter(text.splitlines())
    for line in lines:
        if re.match(r"#+ .*\b(tree|files)\b", line, re.IGNORECASE):
            break
    block: list[str] | None = None
    for line in lines:
        if line.startswith("```"):
            if block is not None:
                break
            block = []
        elif block is not None:
            block.append(line.strip())
        elif line.startswith("#"):
            break
    assert block, "README.md has no fenced file tree under a heading with the word `tree` or `files`"
    entries = [line for line in block if line and not line.startswith("#")]
    bare = [line for line in entries if not re.match(r"\S+ {2,}\S", line)]
    assert not bare, f"lines without a description: {bare}"
    return [line.split()[0] for line in entries]


def test_readme_tree_is_the_tracked_files() -> None:
    tracked = tracked_files()
    listed = readme_tree((REPO / "README.md").read_text(encoding="utf-8"))
    assert len(listed) == len(set(listed)), "a path stands twice in the README's tree"
    assert listed == sorted(listed, key=lambda path: path.rpartition("/")[::2]), "by folder, then by name"
    folders = tuple(path for path in listed if path.endswith("/"))
    unlisted = [name for name in tracked if name not in listed and not name.startswith(folders)]
    assert not unlisted, f"tracked, but not in the README's tree: {unlisted}"
    gone = [
        path
        for path in listed
        if not any(name == path or (path in folders and name.startswith(path)) for name in tracked)
    ]
    assert not gone, f"in the README's tree, but not tracked: {gone}"


def test_readme_tree_reader() -> None:
    tree = "```\n# part\na.py      one\n\ntests/data/  two words\n```\n"
    assert readme_tree(f"# A\n\nwords\n\n## File tree\n\nwords\n\n{tree}\n```\nb.py  no\n```\n") == [
        "a.py",
        "tests/data/",
    ]
    with pytest.raises(AssertionError, match="without a description"):
        readme_tree("## Files\n```\na.py\n```\n")
    with pytest.raises(AssertionError, match="no fenced file tree"):
        readme_tree("## Usage\n```\na.py  one\n```\n")
