"""For mkdocs: files outside docs/ that its pages link to become part of the site, and links to them are led there."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)#\s:]+)")


def on_files(files, config):
    """The README as the first page; other pages and files that it or a page of docs/ links to at their own paths."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("C*.md")]
    linked = {(page.parent / link).resolve() for page in pages for _, link in LINK.findall(page.read_text())}
    names = {str(path.relative_to(ROOT)) for path in linked if path.is_file()} | {"CONTRIBUTING.md", "SECURITY.md"}
    files.append(_file(config, "index.md", ROOT / "README.md"))
    for name in sorted(names):
        if not name.startswith("docs/") and name != "README.md":
            files.append(_file(config, name, ROOT / name))
    return files


def _file(config, name, path):
    if path.suffix != ".md":
        return File.generated(config, name, content=path.read_bytes())
    text = LINK.sub(lambda link: link[1] + _in_site(path, link[2], name), path.read_text())
    return File.generated(config, name, content=text)


def on_page_markdown(markdown, page, config, files):
    """Links of docs/ that leave the folder."""
    source = page.file.abs_src_path
    if source is None:
        return markdown
    return LINK.sub(lambda link: link[1] + _in_site(Path(source), link[2], page.file.src_uri), markdown)


def _in_site(page, link, name):
    """A link of the file ``page`` as one of the site's page ``name``."""
    target = (page.parent / link).resolve()
    if not target.is_relative_to(ROOT) or not target.exists():
        return link
    path = str(target.relative_to(ROOT)).removeprefix("docs/")
    path = {"README.md": "index.md", "examples": "examples/own_loop.py"}.get(path, path)
    return "../" * name.count("/") + path
