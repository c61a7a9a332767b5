"""A sample dataset in the Croissant format 1.1 of MLCommons: JSON-LD about its files and columns."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pipeline.shards.format import MANIFEST, Column
from pipeline.shards.manifest import Manifest, columns_in_order, manifest_text
from pipeline.shards.order import shards_in_order

HDF5 = "application/x-hdf5"


def croissant_text(
    manifest: Manifest,
    *,
    name: str,
    description: str,
    keywords: list[str],
    citation: str,
    licence: str | None = None,
    url: str | None = None,
) -> str:
    """Return the text of croissant.json.

    Every file has its sha256. Croissant has no word yet for a dataset in an HDF5 file: each field names it as the
    column of a table, which tells people and validators where it is, but tools cannot read rows by it.

    Args:
        manifest: of the dataset.
        name, description, keywords, citation, licence, url: words about it; what is None is left out.
    """
    dataset = {
        "@context": _context(),
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": name,
        "description": description,
        "version": f"{manifest.format_version}.{manifest.views}.0",  # more views add samples and change none
        "license": licence,
        "url": url,
        "citeAs": citation,
        "keywords": keywords,
        "distribution": _files(manifest),
        "recordSet": [_rows(manifest)],
    }
    values = {key: value for key, value in dataset.items() if value is not None}
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def _files(manifest: Manifest) -> list[dict[str, str]]:
    text = manifest_text(manifest).encode()
    return [
        _file(MANIFEST, "application/json", len(text), hashlib.sha256(text).hexdigest()),
        *(_file(shard.name, HDF5, shard.bytes, shard.sha256) for shard in shards_in_order(manifest)),
        {"@type": "cr:FileSet", "@id": "shards", "name": "shards", "encodingFormat": HDF5, "includes": "view-*.h5"},
    ]


def _rows(manifest: Manifest) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "rows",
        "name": "rows",
        "description": f"{manifest.totals.rows} rows, a view of a training image each: the datasets of all shards.",
        "field": [_field(name, column) for name, column in columns_in_order(manifest).items()],
    }


def _field(name: str, column: Column) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"rows/{name}",
        "name": name,
        "description": column.meaning,
        # int16 is cr:Int16, uint8 is cr:UInt8
        "dataType": "cr:" + column.dtype.title().replace("Uint", "UInt"),
        "source": {"fileSet": {"@id": "shards"}, "extract": {"column": name}},
        **({"isArray": True, "arrayShape": ",".join(map(str, column.shape))} if column.shape else {}),
    }


def _file(name: str, encoding: str, size: int, sha256: str) -> dict[str, str]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{size} B",
        "encodingFormat": encoding,
        "sha256": sha256,
    }


def _context() -> dict[str, Any]:
    """Return the JSON-LD context of Croissant 1.1, as its specification has it."""
    own = (
        *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileObject"),
        *("fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5"),
        *("parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate"),
        *("separator", "source", "subField", "transform"),
    )
    return {
        "@language": "en",
        "@vocab": "https://schema.org/",
        "sc": "https://schema.org/",
        "cr": "http://mlcommons.org/croissant/",
        "rai": "http://mlcommons.org/croissant/RAI/",
        "dct": "http://purl.org/dc/terms/",
        "conformsTo": "dct:conformsTo",
        "data": {"@id": "cr:data", "@type": "@json"},
        "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
        "description": {"@container": "@language"},
        "examples": {"@id": "cr:examples", "@type": "@json"},
        "name": {"@container": "@language"},
        **{name: f"cr:{name}" for name in own},
    }
