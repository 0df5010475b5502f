"""Does a report hold WCAG 2.1, level AA, in light and dark, on wide and narrow screens?

    npm pack axe-core && tar xf axe-core-*.tgz package/axe.min.js
    python benchmarks/accessibility.py REPORT.html --axe package/axe.min.js --json benchmarks/records/accessibility.json

axe-core's rules of level A and AA are run on the page in Chromium, with all tables opened, for both color schemes at
1400 and 400 px. The exit code is 1 if there is a violation, or if the page is wider than the screen. What axe cannot
decide is listed as "incomplete".
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright
from timing import write_record

from mpvg.runs.environment import environment

TAGS = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa")


def main() -> int:
    """Checks, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of the npm package axe-core")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    axe = given.axe.read_text()
    checked = []
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for width in (1400, 400):
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                page.goto(given.report.resolve().as_uri())
                page.wait_for_selector("#correlation .plot-container")
                page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
                checked.append({"scheme": scheme, "width": width, **check(page, axe)})
                page.close()
        version = browser.version
        browser.close()
    result = {"checked": checked, "tags": TAGS, "chromium": version, "environment": environment()}
    for one in checked:
        count = len(one["violations"])
        print(
            f"{one['scheme']:5s} {one['width']:4d} px: {count} violations, {one['passes']} rules hold, "
            f"page {one['page_width']} px wide"
        )
        for violation in one["violations"]:
            print(f"  {violation['id']}: {violation['help']} ({', '.join(violation['where'][:3])})")
    write_record(given.json, result)
    return int(any(one["violations"] or one["page_width"] > one["width"] for one in checked))


def check(page: Page, axe: str) -> dict[str, Any]:
    """What axe finds, and the width of the page."""
    page.evaluate(axe)
    found = page.evaluate("tags => axe.run(document, {runOnly: {type: 'tag', values: tags}})", list(TAGS))
    return {
        "axe": found["testEngine"]["version"],
        "violations": [brief(one) for one in found["violations"]],
        "incomplete": [brief(one) for one in found["incomplete"]],
        "passes": len(found["passes"]),
        "page_width": page.evaluate("document.documentElement.scrollWidth"),
    }


def brief(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule, and the elements that break it."""
    where = [" ".join(map(str, node["target"])) for node in rule["nodes"]]
    return {"id": rule["id"], "help": rule["help"], "elements": len(where), "where": where[:10]}


if __name__ == "__main__":
    sys.exit(main())
