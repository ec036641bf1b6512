"""Brings pages from outside of docs/ into the site, mends their links, and makes the navigation from the folders."""

import base64
import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository -> pages.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "BUILD_NOTES.md": "build_notes.md",
    "ring_jax/gdn/README.md": "design/gated_delta_rule.md",
}
NOTEBOOKS = Path("examples/notebooks")
# Folders of docs/ -> tabs, in their order; pages at the top of docs/ are guides.
TABS = {
    "Guides": "",
    "Notebooks": "notebooks",
    "API": "api",
    "Design": "design",
    "Kernels": "kernels",
    "Measurements": "measurements",
}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Files, config) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_mended((ROOT / source).read_text(), source, page)))
    for path in sorted((ROOT / NOTEBOOKS).glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=_notebook(path)))
    files.append(File.generated(config, "site.css", content=(ROOT / ".site/site.css").read_text()))
    config["nav"] = _navigation([file.src_uri for file in files.documentation_pages()])
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    source = page.file.src_uri
    return markdown if source in PAGES.values() else _mended(markdown, f"docs/{source}", source)


def _navigation(pages: list[str]) -> list:
    """A tab for each folder; what is in no folder of `TABS` comes under Guides."""
    folders = {folder: tab for tab, folder in TABS.items() if folder}
    found: dict[str, list[str]] = {tab: [] for tab in TABS}
    for page in sorted(pages):
        if page != "index.md":
            found[folders.get(page.split("/")[0], "Guides")].append(page)
    return [{"Home": "index.md"}, *({tab: items} for tab, items in found.items() if items)]


def _mended(markdown: str, source: str, page: str) -> str:
    """Links between files of the repository as links between pages; to what is no page, plain code."""

    def mend(found: re.Match) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if re.match(r"[a-z]+:", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            there = PAGES[path]
        elif path.startswith("docs/") and path.endswith(".md") and (ROOT / path).is_file():
            there = path.removeprefix("docs/")
        elif path.startswith("docs/") and page not in PAGES.values():
            return found[0]  # the generator says whether it is there
        elif (ROOT / path).exists():
            return text if text.startswith("`") else f"{text} (`{path}`)"
        else:
            return found[0]
        return f"[{text}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{anchor})"

    fences = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(mend, part) for part in fences)


def _notebook(path: Path) -> str:
    """An executed notebook as Markdown: code, what it printed, pictures inline."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                image = base64.b64encode(base64.b64decode("".join(data["image/png"]))).decode()
                parts.append(f'<img alt="picture that the cell draws" src="data:image/png;base64,{image}">')
            elif "text/html" in data:
                parts.append(f'<div class="output">{"".join(data["text/html"])}</div>')
            else:
                printed = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"
