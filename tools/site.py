"""MkDocs hooks: pages that lie outside of docs/, an API reference, and links that hold on GitHub and on the site.

The Markdown is written for GitHub, with links between files of the repository. A link to a page becomes a link to that
page of the site. Other files are copied, and a directory becomes a page that lists its files.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]  # MkDocs runs this file by itself

from tools.reference import public_names  # noqa: E402

PAGES = {  # of the repository, by their place on the site
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "examples/smollm2.md": "examples/smollm2/README.md",
    "shipped-pair.md": "python/dami/data/pair/README.md",
}
PLACES = {source: place for place, source in PAGES.items()}
COPIES = "files"  # the directory of the site for files that are not pages
CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the pages of the API reference."""
    for section in config.nav or []:
        if section.get("API reference") is not None:
            section["API reference"] = [f"api/{module}.md" for module in public_names()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, and what they link to."""
    for place, source in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for module, names in public_names().items():
        files.append(File.generated(config, f"api/{module}.md", content=reference_page(module, names)))
    pages = [file for file in files.documentation_pages() if file.src_uri.endswith(".md")]
    linked = {resolve(target, source_of(page.src_uri)) for page in pages for target in links(page.content_string)}
    for path in sorted(linked):
        if path in PLACES or path.startswith("docs/"):
            continue
        if (ROOT / path).is_dir():
            children = sorted(child for child in (ROOT / path).iterdir() if child.is_file())
            lines = [f"- [{child.name}]({child.name})" for child in children]
            content = "\n".join([f"# {path}", "", *lines, ""])
            files.append(File.generated(config, f"{COPIES}/{path}/index.md", content=content))
        else:
            children = [ROOT / path]
        for child in children:
            place = f"{COPIES}/{child.relative_to(ROOT).as_posix()}"
            if child.is_file() and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(child)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    here = page.file.src_uri

    def link(target: str) -> str:
        path, hash, anchor = target.partition("#")
        found = resolve(path, source_of(here))
        place = PLACES.get(found) or (found.removeprefix("docs/") if found.startswith("docs/") else f"{COPIES}/{found}")
        if (ROOT / found).is_dir():
            place += "/index.md"
        return os.path.relpath(place, PurePosixPath(here).parent).replace(os.sep, "/") + hash + anchor

    return markdown if here.startswith(f"{COPIES}/") else replace_links(markdown, link)


def reference_page(module: str, names: list[str]) -> str:
    """The API reference of a module's public names, after what the module says of itself."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    about = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    sections = [f"::: {module}.{name}" for name in names]
    return "\n\n".join([f"# {module}", about.partition("\n")[0], *sections, ""])


def source_of(place: str) -> str:
    """The file of the repository behind a page of the site."""
    return PAGES.get(place, f"docs/{place}")


def resolve(target: str, page: str) -> str:
    """The path in the repository that a link of a page means."""
    path = PurePosixPath(page).parent / target.partition("#")[0]
    return os.path.normpath(path).replace(os.sep, "/")


def links(markdown: str) -> Iterator[str]:
    """The targets of links to other files, except in code."""
    for prose in CODE.split(markdown)[::2]:
        yield from filter(is_ours, LINK.findall(prose))


def replace_links(markdown: str, replace: Callable[[str], str]) -> str:
    """The text with other targets in place of `links`."""
    parts = CODE.split(markdown)
    parts[::2] = [
        LINK.sub(lambda match: replace(match[0]) if is_ours(match[0]) else match[0], prose) for prose in parts[::2]
    ]
    return "".join(parts)


def is_ours(target: str) -> bool:
    """Whether a link leads to another file of the repository."""
    return "://" not in target and not target.startswith(("#", "mailto:"))
