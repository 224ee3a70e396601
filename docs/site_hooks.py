"""What the site shows otherwise than the repository: README.md is its first page, and a link to a
file that is not a page (source, tests, examples) becomes that file's path in the repository."""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of a page, which are relative to where its text stands."""
    here = folder = Path("docs") / Path(page.file.src_uri).parent
    if page.file.src_uri == "index.md":
        folder, markdown = Path(), (ROOT / "README.md").read_text()

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link["text"], link["target"], link["anchor"] or ""
        if ":" in target:
            return link[0]
        path = Path(os.path.normpath(folder / target))
        if path.parts[0] == "docs" and (ROOT / path).is_file():
            return f"[{text}]({os.path.relpath(path, here)}{anchor})"
        if not (ROOT / path).exists():
            return link[0]  # mkdocs says that it leads nowhere
        shown = text.strip("`")
        return f"`{path}`" if shown in str(path) else f"{text} (`{path}`)"

    return LINK.sub(rewritten, markdown)
