"""What stands around the code: workflow files, changelog, citation, the pages of the site, links between them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import heron
from heron.commands import doctor

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PAGES = [
    *ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("heron/ops/*/README.md")
]  # fmt: skip
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def steps(workflow):
    for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values():
        yield from job["steps"]


def missing(command):
    """The make targets and repository files that a workflow's command names and that there are not."""
    targets = set(re.findall(r"\bmake ([\w-]+)", command)) - TARGETS
    files = re.findall(r"(?<![\w/.-])((?:\.github/|\.ci/|tests/|docs/)?[\w/-]+\.(?:py|sh|txt|toml|yml))\b", command)
    return targets | {name for name in files if not (ROOT / name).exists()}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_what_exists_and_asks_for_few_rights(workflow):
    values = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert values["permissions"] in ({}, {"contents": "read"})
    assert all(job["timeout-minutes"] <= 60 for job in values["jobs"].values())
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step), step
        assert re.fullmatch(r"[\w/.-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1")), step
        assert not missing(step.get("run", "")), step
        assert "secrets." not in str(step)


def test_a_target_or_script_that_does_not_exist_would_be_noticed():
    assert missing("make test wheell=1 && make wheell") == {"wheell"}
    assert missing("python .github/nothing.py && python .github/check_wheel.py") == {".github/nothing.py"}
    assert missing("pip install --constraint constraintz.txt ruff") == {"constraintz.txt"}


def test_ci_runs_every_python_that_the_project_claims():
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    pythons = jobs["suite"]["strategy"]["matrix"]["python"]
    assert pythons == sorted(pythons, key=lambda version: int(version.split(".")[1]))
    assert tomllib.loads(read("pyproject.toml"))["project"]["requires-python"] == f">={pythons[0]}"


def test_changelog_and_citation_know_this_version():
    assert re.search(rf"^## \[{re.escape(heron.__version__)}\] - ", read("CHANGELOG.md"), re.MULTILINE)
    assert str(yaml.safe_load(read("CITATION.cff")).get("version", heron.__version__)) == heron.__version__


def test_the_page_about_installing_names_every_extra():
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    table = read("docs/start/install.md").partition("## Extras")[2]
    assert set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))) == extras.keys()


def test_doctor_names_every_package_of_the_extras():
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    of_users = {re.match(r"[\w-]+", wanted)[0] for name in extras.keys() - {"dev", "docs"} for wanted in extras[name]}
    assert of_users == set(doctor._EXTRAS)


def test_every_tool_of_developers_is_pinned():
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    wanted = {re.match(r"[\w-]+", package)[0] for package in extras["dev"] + extras["docs"]} - {"heron-rwkv"}
    assert wanted <= set(re.findall(r"^([\w-]+)==", read("constraints.txt"), re.MULTILINE))
    assert {"ruff", "pyright"} <= wanted


def test_the_wheel_carries_the_types_marker():
    assert "py.typed" in tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]["package-data"]["heron"]
    assert (ROOT / "heron/py.typed").exists()


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_forms_for_issues_parse(form):
    fields = yaml.safe_load(form.read_text(encoding="utf-8")).get("body", [])
    names = [field["id"] for field in fields if field["type"] != "markdown"]
    assert len(names) == len(set(names))
    if form.stem == "bug":
        assert {"command", "doctor", "config"} <= set(names)


def menu(entries):
    for entry in entries:
        for page in entry.values() if isinstance(entry, dict) else [entry]:
            yield from menu(page) if isinstance(page, list) else [page]


def test_the_menu_of_the_site_is_the_pages_of_docs():
    docs, site = ROOT / "docs", yaml.safe_load(read("mkdocs.yml"))
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
    left_out = {line.removeprefix("/") for line in site["exclude_docs"].split()}
    assert sorted(menu(site["nav"])) == sorted(pages - left_out)


def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-") for heading in headings}


def broken(page, text):
    """The relative links in a page's text that lead nowhere; code is left out."""
    prose = re.sub(r"^```.*?^```|^ {4}.*?$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if ":" in path or (there.exists() and (not anchor or anchor in anchors(there))):
            continue
        yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page):
    assert not list(broken(page, page.read_text(encoding="utf-8")))


def test_pages_of_the_site_link_to_pages_alone():
    """A link to code works where the repository's files are read, and breaks `make docs`."""
    on_site = [page for page in PAGES if page.parent != ROOT and ".github" not in page.parts and page.name != "pypi.md"]
    assert len(on_site) > 30
    to_code = [
        (page.relative_to(ROOT).as_posix(), path)
        for page in on_site
        for path in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
        if not path.endswith(".md") and ROOT / "docs" not in (page.parent / path).resolve().parents
    ]
    assert not to_code


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_ends_with_one_newline(page):
    assert re.search(r"[^\n]\n\Z", page.read_text(encoding="utf-8"))


def test_a_broken_link_would_be_noticed():
    links = "[a](nowhere.md) [b](migration.md#checkpoints) [c](migration.md#chekpoints) `[d](no.md)` [e](https://a.b/c)"
    assert list(broken(ROOT / "docs/index.md", links)) == ["nowhere.md", "migration.md#chekpoints"]


def test_the_reading_path_names_files_that_exist():
    names = re.findall(r"`(heron/[\w/]+\.py)`.*<!-- lines -->", read("docs/internals/reading.md"))
    assert len(names) >= 10
    assert all((ROOT / name).is_file() for name in names)


@pytest.mark.parametrize("readme", sorted(ROOT.glob("heron/ops/*/README.md")), ids=lambda path: path.parent.name)
def test_an_op_says_what_was_tried_and_lost(readme):
    assert "\n## Tried and lost\n" in readme.read_text(encoding="utf-8")


def test_a_python_folder_of_ops_has_a_readme():
    folders = {init.parent for init in ROOT.glob("heron/ops/*/__init__.py")}
    assert folders == {readme.parent for readme in ROOT.glob("heron/ops/*/README.md")}
