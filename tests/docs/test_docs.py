"""Every command block of the documentation runs here, in a built project, or says why not."""

import re
import shutil
from typing import NamedTuple

import pytest

from pipeline.configure import configure
from pipeline.core.provenance import ROOT
from tests.support.projects import commit, git, new_project, repro, run_in

pytestmark = pytest.mark.pipeline

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
]
COMMANDS = ("bash", "sh", "shell", "console", "python", "yaml")
# Pages whose blocks other tests run: they need a remote, or a file of their own.
ELSEWHERE = {"docs/SHARING.md": "publish/test_sharing.py", "docs/FORMAT.md": "shards/test_golden.py"}


STORIES = {"docs/TUTORIAL.md"}  # whose blocks build on what the ones before changed; others start from the parameters


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str
    excuse: str | None
    """Why it is not run."""


def blocks_of(page):
    """The blocks of commands of a page, in order."""
    text = (ROOT / page).read_text()
    pattern = r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$"
    return [
        Block(text.count("\n", 0, match.start()) + 1, match[2], match[3], match[1])
        for match in re.finditer(pattern, text, re.M | re.S)
        if match[2] in COMMANDS
    ]


def ids_of(page):
    return [pytest.param(page, block, id=f"{page}:{block.line}") for block in blocks_of(page)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A project after `dvc repro`, with tiny parameters."""
    directory = tmp_path_factory.mktemp("docs") / "project"
    tiny = {
        "dataset.train_images": 200,
        "teacher.network": "resnet8w2",
        "teacher.training.epochs": 15,
        "teacher.training.batch_size": 16,
        "attack.views": 8,
        "seeds": 1,
        "training.epochs": 1,
        "evaluation.similarity_images": 50,
    }
    new_project(directory, tiny)
    repro(directory)
    commit(directory)
    return directory


@pytest.fixture(scope="module")
def projects(built, tmp_path_factory):
    """A copy of it for each page, as its blocks leave it."""
    copies = {}

    def copy_for(page):
        if page not in copies:
            copies[page] = tmp_path_factory.mktemp("page") / "project"
            shutil.copytree(built, copies[page], symlinks=True)
        return copies[page]

    return copy_for


def runnable():
    return [case for page in PAGES if page not in ELSEWHERE for case in ids_of(page)]


@pytest.mark.parametrize(("page", "block"), [case for case in runnable() if not case.values[1].excuse])
def test_a_block_runs(projects, page, block):
    directory = projects(page)
    if page not in STORIES:
        git(directory, "checkout", "--quiet", "params.yaml")
    if block.language == "yaml":
        overlay = directory / "overlay.yaml"
        overlay.write_text(block.text)
        shutil.copy(directory / "params.yaml", directory / "other.yaml")
        assert configure(directory / "other.yaml", [str(overlay)])
        return
    assert block.language in ("bash", "python")
    command = (
        ["bash", "-euo", "pipefail", "-c", block.text] if block.language == "bash" else ["python", "-c", block.text]
    )
    code, output = run_in(directory, command)
    assert code == 0, output
    assert "Traceback" not in output


@pytest.mark.parametrize(("page", "block"), [c for page in PAGES for c in ids_of(page) if c.values[1].excuse])
def test_an_excuse_is_a_reason(page, block):
    assert len(block.excuse.split()) >= 4


@pytest.mark.parametrize("page", ELSEWHERE)
def test_pages_that_are_run_elsewhere_are(page):
    assert page in (ROOT / "tests" / ELSEWHERE[page]).read_text()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / target).exists(), target


def test_every_command_is_on_the_page_of_commands():
    text = (ROOT / "docs/COMMANDS.md").read_text()
    names = {path.stem for path in (ROOT / "stages").glob("[a-z]*.py")} - {"cli"}
    assert names == set(re.findall(r"^\| `(\w+)` \|", text, re.M))


def test_every_page_is_named_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert all(page in text for page in PAGES if page.startswith("docs/"))
