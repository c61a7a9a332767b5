"""The structure of the project, read from its source: which rooms a module needs."""

from pathlib import Path

from pipeline.core.provenance import ROOT, imported_by, path_of


def closure_of(module):
    """A module and all project modules that it imports, directly or not."""
    found, waiting = set(), {module}
    while waiting:
        found |= waiting
        waiting = {name for known in waiting for name in imported_by(known)} - found
    return found


def room_of(module):
    """The folder of a module in a room of the library; of others, their file."""
    path = path_of(module).relative_to(ROOT)
    return Path(*path.parts[:2]) if path.parts[0] == "pipeline" and len(path.parts) > 2 else path


def rooms_of(stage):
    """What a stage's command is made of: rooms and files, relative to the project."""
    return {str(room_of(module)) for module in closure_of(f"stages.{stage}")}


def modules_of(package):
    """All modules of a package, as `pipeline.core.files`."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.parts) for path in paths if path.name != "__init__"}
