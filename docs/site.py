"""Brings into the site what lies elsewhere in the repository, as pages.

Examples, recipes, results, the changelog and CONTRIBUTING stay where their readers look for them,
and links between them and the pages work in both places.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
RESULTS = sorted(path for path in (ROOT / "results").rglob("*") if path.is_file())
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"} | {
    path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix().replace("README", "index")
    for path in RESULTS
    if path.suffix == ".md"
}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add a page for each file that is no page yet."""
    pages = {page: (ROOT / name).read_text() for name, page in PAGES.items()}
    for example in sorted((ROOT / "examples").glob("*.py")):
        pages[f"examples/{example.stem}.md"] = _code(f"examples/{example.name}", example)
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    pages["recipes.md"] = RECIPES + "".join(_code(recipe.stem, recipe, "##") for recipe in recipes)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    for path in RESULTS:
        if path.suffix != ".md":
            page = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, page, abs_src_path=str(path)))
    return files


RECIPES = """\
# Recipes

Settings that come with Gossamer. `gossamer train` and `gossamer compare` know them by name:

```sh
gossamer recipes                           # lists them
gossamer train --config digits-chase
gossamer compare digits-compare
gossamer recipes digits-chase > mine.yaml  # to change one
```

"""


def _code(title: str, file: Path, heading: str = "#") -> str:
    language = {".py": "python", ".yaml": "yaml"}[file.suffix]
    return f"{heading} {title}\n\n```{language}\n{file.read_text()}```\n\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to their pages."""
    generated = {page: name for name, page in PAGES.items()}
    here = generated.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def relink(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        if ":" in target:
            return link[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        found = PAGES.get(wanted, wanted.removeprefix("docs/"))
        found = re.sub(r"^(examples/.*)\.py$", r"\1.md", found)
        found = re.sub(r"^recipes(/.*)?$", "recipes.md", found)
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"]({posixpath.relpath(found, start)}{anchor})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)]*)?\)", relink, markdown)
