"""The contributor's half: forms and workflow fit their schemas, and name what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", [*(ROOT / ".github" / "workflows").glob("*.yml")]),
        ("github-issue-forms", [p for p in FORMS.glob("*.yml") if p.name != "config.yml"]),
        ("github-issue-config", [FORMS / "config.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_files_fit_their_schemas(schema, files):
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    if schema == "citation-file-format":
        command += ["--default-filetype", "yaml"]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True)
    assert files and done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_calls_make_targets_alone():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        assert runs
        for run in runs:
            make, target, *rest = run.split()
            assert make == "make" and target in TARGETS
            assert all(re.fullmatch(r"[A-Z]+=\S+", word) for word in rest)


def test_every_make_target_that_a_page_names_is_there():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {t for page in pages for t in re.findall(r"`?make ([a-z-]+)\b", page.read_text())}
    assert {"setup", "test", "format", "docs"} <= named & TARGETS
    made_of = {n for page in pages for n in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert made_of <= TARGETS


def test_hooks_are_local_and_of_this_environment():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert [hook["language"] for hook in hooks] == ["system"] * len(hooks)
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks:
        assert f"$(BIN)/{hook['entry'].split()[0]}" in makefile


def test_the_versions_of_python_begin_with_the_oldest_that_the_package_takes():
    text = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'requires-python = ">=([\d.]+)"', text)[1]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"][0] == oldest


def test_the_citation_is_of_this_version():
    import nemotron_v3

    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == nemotron_v3.__version__
