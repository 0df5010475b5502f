"""How Sphinx makes the site (`make docs`): of the Markdown pages as they stand, so that GitHub shows the same ones.

The source folder is the root of the repository. What GitHub cannot show is added to the text of a page when it is read:
the navigation to index.md, the docstrings to api.md, and the code of an example after the link to it.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

ROOT = Path(__file__).parent.parent

project = "mpvg"
author = "The mpvg contributors"
version = release = metadata.version("mpvg")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "results/**.md"]
exclude_patterns = [".*", "build", "src", "tests"]

html_theme = "furo"
html_title = f"mpvg {release}"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
templates_path = ["site/templates"]
html_additional_pages = {"index": "redirect.html"}  # the pages keep their paths, and the site still has a first page
html_copy_source = False
html_show_sphinx = False

nitpicky = True  # a reference to nothing is a warning, and `make docs` makes warnings errors
suppress_warnings = ["ref.python"]  # the builtin `set` in annotations, for which the fields `set` of a study are taken
nitpick_ignore_regex = [
    ("py:.*", r"(?!mpvg\.).*"),  # other packages, whose pages would have to be fetched
    ("py:class", r"mpvg\..*\.B(_co)?"),  # type variables
    ("py:class", r"mpvg\.models\.vision_transformer\..*"),  # a torch module is all that others need to know of it
]
myst_heading_anchors = 4
highlight_language = "text"
smartquotes = False  # LN' has a prime
default_role = "code"  # of `this` in docstrings
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_use_rtype = False


def public_names(package: str) -> list[str]:
    """The names that a package has for others: its `__all__`, or what it imports `as` the same name and defines."""
    module = importlib.import_module(package)
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return sorted(name for name in names if name[0] != "_" and not isinstance(getattr(module, name), ModuleType))


def listed_names(section: str) -> list[str]:
    """The full names of a section of api.md: those of the package in its heading, and those that its text names."""
    title = section.split("\n", 1)[0]
    names = [f"{title}.{name}" for name in public_names(title)] if title.startswith("mpvg") else []
    return names + [name for name in re.findall(r"`(mpvg\.[\w.]+)`", section) if name not in names]


def home(name: str) -> tuple[str, str]:
    """The module in which a name is assigned, and its docstring there, as a string after the assignment."""
    module, _, attribute = name.rpartition(".")
    for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
        if isinstance(node, ast.ImportFrom) and node.module and attribute in [alias.name for alias in node.names]:
            return home(f"{node.module}.{attribute}")
    docs = ModuleAnalyzer.for_module(module).find_attr_docs()
    return module, "\n".join(docs.get(("", attribute), []))


def directive(name: str, value: Any) -> str:
    """What shows an object in the reference."""
    if inspect.isclass(value):
        return f".. autoclass:: {name}\n   :members:\n"
    if inspect.isfunction(value):
        return f".. autofunction:: {name}\n"
    return f".. py:data:: {name}\n\n" + textwrap.indent(home(name)[1], "   ") + "\n"


def documented(api: str) -> dict[str, dict[str, Any]]:
    """Heading -> full name -> object, of the text of api.md; an object with several names is where the first is."""
    seen: list[Any] = []
    sections: dict[str, dict[str, Any]] = {}
    for section in re.split(r"^## ", api, flags=re.MULTILINE)[1:]:
        found = sections[section.split("\n", 1)[0]] = {}
        for name in listed_names(section):
            module, _, attribute = name.rpartition(".")
            value = getattr(importlib.import_module(module), attribute)
            if not any(value is other for other in seen):
                found[name] = value
                seen.append(value)
    return sections


def add_docstrings(api: str) -> str:
    """Ends each section of api.md with the docstrings of its names."""
    objects = documented(api)
    head, *sections = re.split(r"^## ", api, flags=re.MULTILINE)
    text = head
    for section in sections:
        blocks = [directive(name, value) for name, value in objects[section.split("\n", 1)[0]].items()]
        if not blocks:
            text += f"## {section}"
            continue
        text += f"## {section.rstrip()}\n\n```{{eval-rst}}\n" + "\n".join(blocks) + "```\n\n"
    return text


def add_navigation(index: str) -> str:
    """Gives each section of index.md a table of contents made of its links, and the tables of results to the claims."""
    text = index
    listed = set()
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        links = re.findall(r"^- \[([^\]]+)\]\(([^)#]+)\.md\)", section, flags=re.MULTILINE)
        entries = [f"{title} <{target}>" for title, target in links if target not in listed]
        listed |= {target for _, target in links}
        caption = section.split("\n", 1)[0]
        text += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```\n"
    return text


def add_code(text: str) -> str:
    """Shows the file after a paragraph that is nothing but the link to an example."""
    line = r"^\[examples/(\w+\.py)\]\((?:\.\./)+examples/\1\)$"
    return re.sub(line, r"\g<0>\n\n```{literalinclude} /examples/\1\n:language: python\n```", text, flags=re.MULTILINE)


def complete(_: Sphinx, name: str, source: list[str]) -> None:
    """Adds to a page what GitHub cannot show."""
    text = add_code(source[0])
    if name == "docs/index":
        text = add_navigation(text)
    elif name == "docs/api":
        text = add_docstrings(text)
    elif name == "docs/claims":
        text += "\n```{toctree}\n:hidden:\n:glob:\n\n/results/**\n```\n"
    source[0] = text


def keep_colons(_: Sphinx, what: str, __: str, ___: object, ____: object, lines: list[str]) -> None:
    """Keeps napoleon from taking what stands before a colon, in the docstring of a field, for its type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def shorten(_: Sphinx, __: str, ___: str, value: object, *____: object) -> tuple[str, None] | None:
    """Leaves out the signature of a dataclass: its fields follow one by one."""
    return ("", None) if dataclasses.is_dataclass(value) else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon, at 500
    app.connect("autodoc-process-signature", shorten)
