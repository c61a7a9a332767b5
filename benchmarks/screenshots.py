"""Pictures of reports/report.html for the documentation; needs Chromium.

python -m benchmarks.screenshots            # writes docs/figures/report.png, gallery.png and maps.png
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from pipeline.core.provenance import ROOT

PARTS = {"gallery": "#gallery .gallery", "maps": "#maps .row"}


@click.command()
@click.option("--report", type=click.Path(path_type=Path), default=ROOT / "reports/report.html", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs/figures", show_default=True)
def main(report: Path, out: Path) -> None:
    """Photograph the top of the report, its gallery and a row of decision maps."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 1000})
        page.goto(report.resolve().as_uri())
        page.wait_for_function(
            "document.querySelectorAll('svg.marks').length >= document.querySelectorAll('.plot').length"
        )
        page.screenshot(path=out / "report.png")
        for name, selector in PARTS.items():
            page.locator(selector).first.screenshot(path=out / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
