"""The site of guides and API reference. `make docs` builds it into build/docs; warnings are errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click
import typer
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.util.nodes import nested_parse_with_titles

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cnnlstm_fast  # noqa: E402

project = "cnnlstm_fast"
author = "The cnnlstm_fast authors"
copyright = author
version = release = cnnlstm_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # README and guides link to headings as a repository's pages do

html_theme = "furo"
html_title = f"cnnlstm_fast {release}"
html_show_sphinx = False
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # a docstring says types where shapes don't
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shapes"]

# Every name that a docstring refers to must stand in this reference, except PyTorch's and Python's own: their
# inventories would have to be downloaded.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(torch|nn|copy|collections)\b.*|[A-Z]\w*(Error|Warning)|None")]


def point_to_site(text: str) -> str:
    """README's links as a page of ``docs/`` has them; folders of the repository have no page in the site."""

    def replaced(link: re.Match) -> str:
        label, target = link[1], link[2]
        if "://" in target or target.startswith("#"):
            return link[0]
        if target.startswith("docs/"):
            return f"[{label}]({target.removeprefix('docs/')})"
        return label if (ROOT / target).is_dir() else f"[{label}](../{target})"

    return re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)]+)\)", replaced, text)


class Commands(Directive):
    """The commands of a Typer application ``module:name``, their arguments and options, from its own help."""

    required_arguments = 2
    has_content = False

    def run(self):
        module, _, name = self.arguments[0].partition(":")
        program = self.arguments[1]
        app = getattr(__import__(module, fromlist=[name]), name)
        lines: list[str] = []
        for command in typer.main.get_command(app).commands.values():
            title = f"python -m {program} {command.name}"
            lines += [title, "-" * len(title), "", *(command.help or "").replace("`", "``").splitlines(), ""]
            for parameter in command.params:
                if found := _described(parameter, click.Context(command)):
                    lines += found
        node = self.state.document.__class__(self.state.document.settings, self.state.document.reporter)
        nested_parse_with_titles(self.state, StringList(lines, self.arguments[0]), node)
        return node.children


def _described(parameter: click.Parameter, context: click.Context) -> list[str]:
    record = parameter.get_help_record(context)
    if record is None:
        return []
    names, text = record
    return [f"``{names}``", f"    {' '.join(text.split())}", ""]


def _include(app, path, parent, content: list[str]) -> None:
    content[0] = point_to_site(content[0])


def setup(app):
    app.add_directive("commands", Commands)
    app.connect("include-read", _include)
