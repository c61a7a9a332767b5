"""Fingerprints: what an edit makes again, and what it does not."""

import hashlib
import re
import shutil
from typing import NamedTuple

import pytest

from pipeline.attack.dataset import shard_code
from pipeline.core import provenance
from pipeline.core.provenance import ROOT, code_digest, fingerprint
from pipeline.evaluate.run import comparison_code
from pipeline.student.run import fit_code
from pipeline.teacher import teacher_code
from tests.support.files import tiny_params


def test_fingerprint_is_the_digest_of_sorted_json():
    expected = hashlib.sha256(b'[{"a": [1, 2.5], "b": null}, "x"]').hexdigest()
    assert fingerprint({"b": None, "a": (1, 2.5)}, "x") == expected


def test_fingerprint_tells_parts_types_and_order_apart():
    parts = [(), (1,), ("1",), (1.0,), (True,), (1, 2), (2, 1), ([1, 2],), ({"a": 1},), ({"a": 2},)]
    assert len({fingerprint(*each) for each in parts}) == len(parts)


def test_fingerprint_refuses_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint({"rate": float("nan")})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the library, from which code digests are taken, each time anew."""
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path / "pipeline"


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, f"{path}: {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new))


def codes():
    """The digest of the code of every kind of result, as a process that begins now sees it."""
    method = tiny_params().method
    kinds = {
        "teacher": lambda: teacher_code("resnet8"),
        **{f"shards {search}": lambda s=search: shard_code(s, "resnet8") for search in ("newton", "deepfool")},
        "original": lambda: fit_code("resnet8", method["original"], "newton", None),
        **{name: lambda n=name: fit_code("resnet8", method[n], "newton", None) for name in ("hinton", "bss", "dkd")},
        "at": lambda: fit_code("resnet8", method["at"], "newton", "resnet8"),
        "bss online": lambda: fit_code("resnet8", method["bss_online"], "newton", "resnet8"),
        "comparison": lambda: comparison_code("resnet8", "resnet8"),
    }
    forget()
    found = {name: digest() for name, digest in kinds.items()}
    forget()
    return found


def forget():
    """Let the next digests be those of a process that begins now."""
    provenance._content_of.cache_clear()


@pytest.fixture(scope="module")
def unedited():
    return codes()


SHARDS = {"shards newton", "shards deepfool"}
FITS = {"teacher", "original", "hinton", "bss", "dkd", "at", "bss online"}
FROM_SHARDS = {"hinton", "bss", "dkd", "at"}
SEARCHED = {*SHARDS, "bss online", "comparison"}
ALL = SHARDS | FITS | {"comparison"}


class Edit(NamedTuple):
    """One edit of one module, and the results that are made again after it."""

    module: str
    old: str
    new: str
    again: set


EDITS = {
    # What decides nothing.
    "a comment": Edit("search/newton.py", "# forward passes on one ray", "# at most, on one ray", set()),
    "a docstring": Edit("images/views.py", '"""Views: ', '"""Other views: ', set()),
    "layout": Edit("images/views.py", "(padded - size + 1)", "(\n            padded-size + 1)", set()),
    "the reader of URLs": Edit("shards/folder.py", "METADATA_BLOCK = 1 << 16", "METADATA_BLOCK = 1 << 17", set()),
    "a limit on strangers' manifests": Edit(
        "shards/limits.py", "LARGEST_MANIFEST = 16", "LARGEST_MANIFEST = 17", set()
    ),
    "a limit on strangers' shards": Edit(
        "shards/limits.py", "LARGEST_CHUNK = 1 << 24", "LARGEST_CHUNK = 1 << 23", set()
    ),
    "a tolerance of the check": Edit("shards/check.py", "CLOSE = 1e-3", "CLOSE = 2e-3", set()),
    "a check of manifests": Edit(
        "shards/manifest.py", "<= 1e6 for value in manifest.mean", "<= 1e7 for value in manifest.mean", set()
    ),
    "a check of teachers": Edit("networks/loading.py", "MARGIN_OVER_CHANCE = 0.05", "MARGIN_OVER_CHANCE = 0.1", set()),
    "an error's message": Edit("networks/weights.py", "holds values that are not finite", "is not finite", set()),
    "an error's message about layers": Edit(
        "training/term.py", "takes no part: name another", "is never called", set()
    ),
    "a range of a parameter": Edit("core/parameters.py", "Field(ge=1, le=1000)", "Field(ge=1, le=2000)", set()),
    "how a file is replaced": Edit("core/files.py", "hex[:8]", "hex[:9]", set()),
    "how forks are started": Edit("machine/forks.py", "PR_SET_PDEATHSIG = 1", "PR_SET_PDEATHSIG = 2", set()),
    "how many cores there are": Edit("machine/processor.py", 'f"CPU quota {', 'f"the CPU quota {', set()),
    "how images are decoded": Edit(
        "prepare/picture.py", "background * (255 - alpha) + 127", "background * (255 - alpha)", set()
    ),  # the digest of the prepared images tells
    "the card": Edit("publish/card.py", "0.05, 0.25, 0.5", "0.05, 0.2, 0.5", set()),
    "the report": Edit("report/charts.py", "BINS = 40", "BINS = 41", set()),
    # What decides some results.
    "another search": Edit("search/deepfool.py", "steps: int = 50", "steps: int = 60", {"shards deepfool"}),
    "the search": Edit("search/newton.py", "AIM = 0.95", "AIM = 0.9", SEARCHED - {"shards deepfool"}),
    "what searches share": Edit("search/geometry.py", "MOST_LEVELS = 127", "MOST_LEVELS = 126", SEARCHED),
    "target classes": Edit("search/targets.py", "2.0**-54", "2.0**-53", SHARDS | {"bss online"}),
    "bytes of HDF5 files": Edit("core/hdf5.py", '("v108", "v108")', '("v110", "v110")', SHARDS | {"comparison"}),
    "the order of columns": Edit("publish/writer.py", "for name in columns:", "for name in sorted(columns):", SHARDS),
    "a column's type": Edit(
        "shards/format.py", '"flip": Column("uint8"', '"flip": Column("int8"', SHARDS | FROM_SHARDS
    ),
    "how columns are filled": Edit(
        "attack/columns.py", 'values["margin"][lost] = 0', 'values["margin"][lost] = 1', SHARDS
    ),
    "a loss": Edit(
        "losses/bss.py", "start * (1 - progress / zero_at)", "start * (2 - progress / zero_at)", {"bss", "bss online"}
    ),
    "a loss that another one uses": Edit(
        "losses/hinton.py", "logits / temperature, dim=-1)\n", "logits, dim=-1)\n", {"hinton", "bss", "bss online"}
    ),
    "a loss alone": Edit("losses/dkd.py", "temperature**2 * target", "temperature * target", {"dkd"}),
    "the fit loop": Edit("training/fit.py", "task.seed * epochs", "task.seed + epochs", FITS),
    "the sum of losses": Edit(
        "training/objective.py", "total = total + term(step)", "total = total - term(step)", FITS
    ),
    "the order of an epoch": Edit("shards/order.py", "WINDOW_SHARDS = 16", "WINDOW_SHARDS = 8", FROM_SHARDS),
    "how columns are read": Edit(
        "shards/file.py", "inflate.decompress(stored.data", "inflate.decompress(stored.data[:9]", FROM_SHARDS
    ),
    "batches from shards": Edit("student/shard_source.py", "self.seed, 3, epoch", "self.seed, 4, epoch", FROM_SHARDS),
    "views": Edit("images/views.py", "WORDS_PER_COUNTER = 4", "WORDS_PER_COUNTER = 8", ALL - {"comparison"}),
    "what a pixel is": Edit("images/pixels.py", "255.0,", "256.0,", ALL),
    "a network": Edit("networks/resnet.py", "F.avg_pool2d(x, 1, self.stride)", "F.max_pool2d(x, 1, self.stride)", ALL),
    "a network of the CIFAR-100 comparison": Edit("networks/cifar/vgg.py", "POOLED = 3", "POOLED = 2", ALL),
    "how a network is named": Edit("core/network_names.py", "match[2] or 16", "match[2] or 8", ALL),
    "gradients in bfloat16": Edit("networks/fast.py", "model, 0.1,", "model, 0.2,", SEARCHED | {"at"}),
    "threads": Edit("machine/device.py", "torch.set_num_threads(1)", "torch.set_num_threads(2)", ALL),
    "the measure": Edit("evaluate/compare.py", "max_gradients=20", "max_gradients=30", {"comparison"}),
    "AngSim": Edit("evaluate/similarity.py", ".clamp(-1, 1)", ".clamp(0, 1)", {"comparison"}),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_makes_again_what_it_may_change(unedited, package, name):
    module, old, new, again = EDITS[name]
    edit(package / module, old, new)
    after = codes()
    assert {kind for kind in unedited if unedited[kind] != after[kind]} == again


def renamed(package, old, new):
    """Move a module, as `search/geometry` to `images/shapes`, and let all others import it from there."""
    (package / f"{old}.py").rename(package / f"{new}.py")
    for path in package.rglob("*.py"):
        text = path.read_text()
        for module in (old, new):
            assert f"pipeline.{module.replace('/', '.')}X" not in text
        path.write_text(re.sub(rf"\bpipeline\.{old.replace('/', '.')}\b", f"pipeline.{new.replace('/', '.')}", text))


@pytest.mark.parametrize(
    ("old", "new"),
    [("search/geometry", "images/zebra"), ("images/views", "images/aardvark"), ("shards/order", "core/order")],
)
def test_a_module_that_moves_makes_nothing_again(unedited, package, old, new):
    renamed(package, old, new)
    assert codes() == unedited


def test_a_name_that_comes_from_another_module_makes_again(package):
    """Both modules are imported anyway: only where the name is from differs."""
    (package / "images/other.py").write_text("def pixels(images):\n    return images.float() / 256\n")
    views = package / "images/views.py"
    views.write_text(
        views.read_text() + "\nfrom pipeline.images import other  # noqa\nfrom pipeline.images.pixels import pixels\n"
    )
    before = codes()
    edit(views, "from pipeline.images.pixels import pixels", "from pipeline.images.other import pixels")
    assert {kind for kind, digest in codes().items() if digest != before[kind]} == ALL - {"comparison"}


@pytest.mark.parametrize(
    "way", ["from pipeline import pixels", "from . import pixels", "import pipeline", "from .passed import *"]
)
def test_names_that_come_through_a_package_are_seen(package, way):
    user = package / "losses/mine.py"
    passed = {"__init__.pyi": "from .images.pixels import pixels as pixels\n__version__: str\n"}
    (package / "__init__.pyi").write_text(passed["__init__.pyi"])
    if way.startswith("from ."):
        (package / "losses/__init__.py").write_text("from pipeline.images.pixels import pixels\n")
        way = way.replace("from .passed import *", "from pipeline.losses import pixels")
    user.write_text(f"{way}\n")

    def digest():
        forget()
        return code_digest("pipeline.losses.mine")

    before = digest()
    edit(package / "images/pixels.py", "255.0,", "256.0,")
    assert digest() != before


def test_the_code_of_a_process_is_what_it_first_saw(package):
    forget()
    before = code_digest("pipeline.images.views", alone=("pipeline.core.status",))
    edit(package / "images/views.py", "WORDS_PER_COUNTER = 4", "WORDS_PER_COUNTER = 8")
    assert code_digest("pipeline.images.views", alone=("pipeline.core.status",)) == before
    forget()
    assert code_digest("pipeline.images.views", alone=("pipeline.core.status",)) != before
    forget()


def test_code_digest_tells_modules_apart():
    assert code_digest("pipeline.core.status") != code_digest("pipeline.images.views")
    both = ("pipeline.core.status", "pipeline.images.views")
    assert code_digest(*both) == code_digest(*reversed(both))


def test_circles_among_the_users_modules_end(package):
    (package / "losses/one.py").write_text("from pipeline.losses.two import b\na = 1\n")
    (package / "losses/two.py").write_text("from pipeline.losses.one import a\nb = 1\n")
    forget()
    before = code_digest("pipeline.losses.one")
    edit(package / "losses/two.py", "b = 1", "b = 2")
    forget()
    assert code_digest("pipeline.losses.one") != before
    forget()
