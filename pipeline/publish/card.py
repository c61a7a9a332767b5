"""The card of a published sample dataset: README.md for people and hubs, croissant.json for machines.

Both follow from the dataset and from what its maker states of the images, so that the same dataset has the same
bytes: no clock, no host, no versions of software. Everything here works without torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.core.files import write_atomically
from pipeline.core.parameters import Card
from pipeline.core.status import Status
from pipeline.core.text import filled, markdown_table
from pipeline.publish.croissant import croissant_text
from pipeline.shards.format import MANIFEST, SHARD_FILES
from pipeline.shards.manifest import Manifest, columns_in_order
from pipeline.shards.order import shards_in_order
from pipeline.shards.quantiles import Quantiles, quantiles_of

README = "README.md"
CROISSANT = "croissant.json"
DATASET_FILES, CARD_FILES = (SHARD_FILES, MANIFEST), (README, CROISSANT)  # names in a directory of shards

EMPTY_CARD = Card(title=None, licence=None, source=None, terms=None, url=None)
TITLE = "Boundary-supporting samples"
TAGS = ["knowledge-distillation", "decision-boundary", "adversarial-examples", "hdf5"]
TITLE_OF_LOGITS, TAGS_OF_LOGITS = "Logits of a teacher on augmented views", ["knowledge-distillation", "hdf5"]
# Parameters of a dataset that was made from finished ones.
HOW_COMBINED = {
    "merged": " The views of several datasets, listed under `merged`, were then put together.",
    "sample": " It is a preview: `sample` says how many rows of a whole dataset, and which one.",
}
WITHOUT_TEACHER = "Students can be distilled from it without the teacher"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")

# SPDX identifiers that the Hugging Face hub takes, in lower case; it refuses a card that names another as `license`.
HUB_LICENCES = {
    *("cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
    *("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-permissive-1.0", "cdla-permissive-2.0"),
    *("cdla-sharing-1.0", "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-2.0", "gpl-3.0", "unlicense"),
}

LINK = re.compile(r"(https?://[^\s<>|`]*[^\s<>|`.,;:!?)'\"])")
# What Markdown would read as markup: not an underscore within a word, nor an ampersand that begins no entity.
MARKUP = re.compile(r"[\\`*\[\]<>|$~#]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")

CITATION = """@inproceedings{heo2019knowledge,
  title     = {Knowledge Distillation with Adversarial Samples Supporting Decision Boundary},
  author    = {Heo, Byeongho and Lee, Minsik and Yun, Sangdoo and Choi, Jin Young},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year      = {2019}
}"""


def write_card(directory: Path, manifest: Manifest, card: Card = EMPTY_CARD) -> None:
    """Write README.md and croissant.json into a directory of shards; call it before the manifest is written there.

    Args:
        directory: where the shards are; three small columns of each are read, one shard at a time.
        manifest: of these shards; croissant.json holds the digest of its text.
        card: what is stated of the images.

    Raises:
        ShardError: a shard is missing, unreadable or another one.
        StoreError: a file cannot be written.
    """
    write_atomically(directory / README, readme_text(manifest, card, quantiles_of(directory, manifest, QUANTILES)))
    write_atomically(directory / CROISSANT, croissant_card(manifest, card))


def readme_text(manifest: Manifest, card: Card, spread: Quantiles | None) -> str:
    """Return the card for people: Markdown, under metadata as the Hugging Face hub reads them.

    Args:
        manifest: of the dataset.
        card: what is stated of the images; it may hold any characters, none of them becomes markup.
        spread: of the converged samples, None if there are none.
    """
    values = {
        "manifest": manifest,
        "metadata": _metadata(manifest, card),
        "title": _title(manifest, card),
        "summary": _summary(manifest),
        "afterwards": "".join(text for name, text in HOW_COMBINED.items() if manifest.parameters.get(name) is not None),
        "parameters": json.dumps(manifest.parameters, indent=2, sort_keys=True),
        "origin": _origin(manifest),
        "columns": _columns(manifest),
        "counts": _counts(manifest),
        "statuses": _statuses(manifest) if manifest.targets else "",
        "quantiles": None if spread is None else _quantiles(spread),
        "embedded": "image" in manifest.columns,
        "first_shard": shards_in_order(manifest)[0].name,
        "stated": {
            "Licence of the images": card.licence,
            "Source of the images": card.source,
            "Terms of use": card.terms,
            "Published at": card.url,
        },
        "citation": CITATION,
    }
    return filled("pipeline.publish", "card.md.j2", values, {"escaped": _escaped, "one_line": _json_line}, html=False)


def _title(manifest: Manifest, card: Card) -> str:
    return card.title or (TITLE if manifest.targets else TITLE_OF_LOGITS)


def _tags(manifest: Manifest) -> list[str]:
    return TAGS if manifest.targets else TAGS_OF_LOGITS


def _json_line(value: Any) -> str:
    """Return a JSON value in one line, which is also a YAML value, whatever characters it holds."""
    return json.dumps(value, ensure_ascii=False)


def _metadata(manifest: Manifest, card: Card) -> dict[str, Any]:
    """Return what the Hugging Face hub reads."""
    return {
        "pretty_name": _title(manifest, card),
        **_hub_licence(card.licence),
        "task_categories": ["image-classification"],
        "tags": _tags(manifest),
        "size_categories": [SIZES[min(max(len(str(manifest.totals.rows)) - 3, 0), len(SIZES) - 1)]],
    }


def _hub_licence(licence: str | None) -> dict[str, str]:
    if licence is None:
        return {"license": "unknown"}
    if licence.lower() in HUB_LICENCES:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": licence}


def _summary(manifest: Manifest) -> str:
    """Return two sentences, in plain text."""
    if manifest.is_sample:
        views = "a view" if manifest.rows == 1 else f"{manifest.rows:,} views"
        subject = f"{views} of training images, drawn at random from a larger dataset"
    else:
        views = "an augmented view" if manifest.views == 1 else f"{manifest.views} augmented views"
        subject = f"{views} of each of {manifest.rows:,} training images"
    if not manifest.targets:
        return f"For {subject}: the logits of one trained classifier (the teacher). {WITHOUT_TEACHER}."
    classes = "another class" if manifest.targets == 1 else f"{manifest.targets} other classes"
    return (
        f"For {subject}: samples close by, at the decision boundary of one trained classifier (the teacher) to "
        f"{classes}, and the teacher's logits on view and sample. "
        f"{WITHOUT_TEACHER}, by the method of Heo et al. (2019)."
    )


def _origin(manifest: Manifest) -> str:
    facts = [
        *([] if manifest.is_sample else [("views", str(manifest.views))]),
        ("sha256 of the teacher's weights file", f"`{manifest.digests.teacher}`"),
        ("content digest of the training split", f"`{manifest.digests.train}`"),
        ("fingerprint of parameters, inputs and code", f"`{manifest.fingerprint}`"),
        ("format version", str(manifest.format_version)),
    ]
    return markdown_table(("", ""), facts)


def _columns(manifest: Manifest) -> str:
    rows = [
        (f"`{name}`", c.dtype, "scalar" if not c.shape else " x ".join(map(str, c.shape)), _escaped(c.meaning))
        for name, c in columns_in_order(manifest).items()
    ]
    return markdown_table(("column", "dtype", "shape of a row", "meaning"), rows)


def _counts(manifest: Manifest) -> str:
    totals = manifest.totals
    counts = {
        "training images": manifest.rows,
        "classes": len(manifest.class_names),
        "views of each image": manifest.views,
        "rows: views of all images": totals.rows,
        "rows: drawn views": totals.rows,
        "target classes of each view": manifest.targets,
        "samples": totals.samples,
        "shards": totals.shards,
        "bytes of all shards": totals.bytes,
    }
    if not manifest.targets:
        del counts["target classes of each view"], counts["samples"]
    of_whole = ("training images", "views of each image", "rows: views of all images")
    for name in of_whole if manifest.is_sample else ("rows: drawn views",):
        del counts[name]
    return markdown_table(("", ""), [(name, f"{count:,}") for name, count in counts.items()])


def _statuses(manifest: Manifest) -> str:
    totals = manifest.totals
    rows = [
        (f"`{name}`", f"{count:,}", f"{count / totals.samples:.2%}")
        for name, count in ((s.name.lower(), totals.statuses.get(s.name.lower(), 0)) for s in Status)
    ]
    return markdown_table(("status", "samples", "share"), rows)


def _quantiles(spread: Quantiles) -> str:
    rows = [
        ("probability margin tanh(abs(m) / 2)", *(f"{value:.3g}" for value in spread.probability_margin)),
        ("distance, L2, pixels in [0, 1]", *(f"{value:.3g}" for value in spread.distance)),
    ]
    return markdown_table(("", *(f"{q:.0%}" for q in QUANTILES)), rows)


def croissant_card(manifest: Manifest, card: Card) -> str:
    """Return the card for machines, in the Croissant format."""
    stated = (("Source of the images", card.source), ("Terms of use", card.terms))
    return croissant_text(
        manifest,
        name=_title(manifest, card),
        description=" ".join([_summary(manifest), *(f"{name}: {text}" for name, text in stated if text is not None)]),
        keywords=_tags(manifest),
        citation=CITATION,
        licence=card.licence,
        url=card.url,
    )


def _escaped(text: str) -> str:
    """Return a line of text as Markdown that shows just this text, URLs as links."""
    parts = LINK.split(" ".join(text.split()))
    return "".join(f"<{part}>" if n % 2 else MARKUP.sub(r"\\\g<0>", part) for n, part in enumerate(parts))
