"""What a linter can't hold: import directions, README's promises, files that must be in the repository."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes import ROOT

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py"))
PHASES = ("train_jepa", "train_contrastive", "train_supervised", "train_flow")


def imports(path: Path) -> set[str]:
    """The top-level packages a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_only_the_module_that_opens_recordings_imports_mne():
    users = [p.name for folder in ("lib", "kernels") for p in (ROOT / folder).glob("*.py") if "mne" in imports(p)]
    assert users == ["recordings.py"] and not any("mne" in imports(ROOT / f"{s}.py") for s in SCRIPTS)


def test_imports_go_from_script_to_lib_to_kernels():
    for path in (ROOT / "lib").glob("*.py"):
        assert not imports(path) & {*SCRIPTS, "tests"}, path.name
    for path in (ROOT / "kernels").glob("*.py"):
        if path.name != "bench.py":
            assert not imports(path) & {*SCRIPTS, "lib", "tests"}, path.name


def test_training_starts_without_mne_and_building_and_serving_without_torch():
    program = "import sys, {0}; print(sorted({{'mne', 'torch'}} & set(sys.modules)))"
    light = ("build_cache", "serve_realtime")
    for script, loaded in (*((phase, "['torch']") for phase in PHASES), *((name, "[]") for name in light)):
        words = [sys.executable, "-c", program.format(script)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == loaded, script


def test_every_file_the_readme_lists_exists():
    table = re.findall(r"^\| (`.+?`) \|", (ROOT / "README.md").read_text(), re.M)
    listed = [name for row in table for name in re.findall(r"`([^`]+)`", row)]
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert len(listed) > 15
    for name in listed + [link for link in links if "://" not in link]:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_every_command_in_the_docs_parses(page):
    from lib import command

    known = {f"{name}.py": (importlib.import_module(name).Config, None) for name in ("build_cache", "serve_realtime")}
    known |= {f"{m.__name__}.py": (m.Config, m.PRESETS) for m in map(importlib.import_module, PHASES)}
    blocks = re.findall(r"^```\w*\n(.+?)^```", (ROOT / page).read_text(), re.M | re.S)
    for line in "\n".join(blocks).splitlines():
        for part in re.split(r"&&|\|(?!\|)", line.strip().lstrip("`").split("  #")[0]):
            words = (
                shlex.split(part.replace("…", "PATH").replace("`", ""), comments=True)
                if "python " in part or "torchrun " in part
                else []
            )
            scripts = [i for i, word in enumerate(words) if word in known]
            if scripts and words[0] in ("python", "torchrun"):
                config, presets = known[words[scripts[0]]]
                flags = [
                    w for w in words[scripts[0] + 1 :] if w != "--resume"
                ]  # --resume reads the run's own flags from disk
                assert command.parse(config, flags, "", presets), line


@pytest.mark.parametrize("script", ["build_cache", "serve_realtime", *PHASES])
def test_help_says_what_every_flag_is(script, capsys):
    from lib import command

    config = importlib.import_module(script).Config
    with pytest.raises(SystemExit):
        command.parse(config, ["--help"])
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    text = " ".join(line.strip(" │|") for line in text.splitlines())
    flags = re.findall(r" --([a-z-]+)(?:, --no-[a-z-]+| \S+|(?: \[.*?\]\])|(?: \{.*?\}\]*)+) (.*?)\(default:", text)
    assert len(flags) > 20
    for name, help in flags:
        assert help.strip() and help.split()[-1] not in ("what", "objective", "network"), name  # a section's comment


def test_ci_runs_the_readmes_two_commands():
    blocks = re.findall(r"^```bash\n(.+?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert "python build_cache.py && python train_jepa.py" in blocks[0]
    assert "ruff check ." in blocks[1] and "pytest" in blocks[1]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_lib_is_not_ignored_by_git():
    done = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "lib/cache.py"], capture_output=True, text=True)
    assert done.stdout == ""


def test_the_readme_names_every_module():
    text = (ROOT / "README.md").read_text()
    missing = [p.name for p in (ROOT / "lib").glob("*.py") if p.name != "__init__.py" and f"lib/{p.name}`" not in text]
    assert not missing
