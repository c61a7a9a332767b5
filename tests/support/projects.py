"""Projects of their own for tests of DVC: a copy of this one with tiny parameters, and commands in it."""

import hashlib
import os
import re
import shutil
import subprocess
import sys

from ruamel.yaml import YAML

from pipeline.core.provenance import ROOT
from pipeline.core.text import place_of

# Whatever commits, does so under this name.
IDENTITY = {f"GIT_{role}_{what}": "test@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def new_project(directory, changes):
    """A git repository with the project's files and changed parameters."""
    directory.mkdir()
    for name in ("pipeline", "stages", "experiments", "presets", "data", "docs/results", ".dvc"):
        ignore = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local", "prepared", "bss", "raw")
        shutil.copytree(ROOT / name, directory / name, ignore=ignore)
    (directory / "data/raw").mkdir()
    for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore", "data/raw/.gitignore"):
        shutil.copy(ROOT / name, directory / name)
    change_params(directory, changes)
    git(directory, "init", "-q")
    commit(directory)


def change_params(directory, changes):
    yaml = YAML()
    path = directory / "params.yaml"
    values = yaml.load(path)
    for key, value in changes.items():
        section, name = place_of(values, key)
        section[name] = value
    yaml.dump(values, path)


def git(directory, *arguments):
    subprocess.run(["git", *arguments], cwd=directory, env=os.environ | IDENTITY, check=True)


def commit(directory):
    """Commit all that is there."""
    git(directory, "add", ".")
    git(directory, "commit", "-qm", "as it is")


def repro(directory, *arguments):
    """What `dvc repro` prints."""
    return dvc(directory, "repro", *arguments)


def dvc(directory, *arguments):
    """What a DVC command prints that must end well."""
    code, output = run_in(directory, ["dvc", *arguments])
    assert code == 0, output
    return output


def run_in(directory, command, environment=None):
    """(exit code, output) of a command in a project; the running Python's commands come first on the path."""
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    result = subprocess.run(
        command,
        cwd=directory,
        env=os.environ | IDENTITY | {"PATH": path, "PYTHONPATH": str(directory)} | (environment or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return result.returncode, result.stdout


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.glob("*"))}


def page_blocks(path):
    """The bash blocks of a page under each heading, without those that a comment says are `not run`."""
    blocks, heading = {}, ""
    pattern = r"^#+ ([^\n]+)$|^(<!-- not run: [^\n]+ -->\n)?```(\w*)\n(.*?)^```$"
    for title, excuse, language, block in re.findall(pattern, path.read_text(), re.M | re.S):
        heading = title or heading
        if language == "bash" and not excuse:
            blocks.setdefault(heading, []).append(block)
    return blocks
