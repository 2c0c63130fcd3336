"""Settings of the documentation: ``python -m sphinx -W --keep-going docs build/docs``."""

import inspect
import re
import shutil
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.models import OptionInfo

import obert_kernels
from obert_kernels.commands.cli import app as command_line

project = "obert_kernels"
author = copyright = "The obert_kernels authors"
release = obert_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["images"]

highlight_language = "none"

html_theme = "furo"
html_title = f"obert_kernels {release}"
html_show_sourcelink = html_copy_source = False
html_math_renderer = "mathml"  # readable without a network, which MathJax would need

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring, napoleon_numpy_docstring, napoleon_use_ivar = True, False, True
autodoc_member_order, autodoc_preserve_defaults = "bysource", True
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 90


class CommandOptions(SphinxDirective):
    """``.. command-options:: run``: the options of ``obert-prune run``, from its signature."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        (command,) = (
            found.callback
            for found in command_line.registered_commands
            if (found.name or found.callback.__name__) == name
        )
        hints = get_type_hints(command, include_extras=True)
        panels: dict[str, list[str]] = {"Arguments": [], "Options": []}
        for parameter in inspect.signature(command).parameters.values():
            kind, info = get_args(hints[parameter.name])[:2]
            panel = "Options" if isinstance(info, OptionInfo) else "Arguments"
            entry = _entry(parameter, kind, info)
            panels.setdefault(info.rich_help_panel or panel, []).append(entry)
        usage = " ".join([name, *re.findall(r"option:: (\w+)", "".join(panels["Arguments"]))])
        text = f".. program:: obert-prune {name}\n\n::\n\n   obert-prune {usage} [OPTIONS]\n\n"
        text += f"{inspect.getdoc(command)}\n\n"
        for panel, entries in panels.items():
            text += f".. rubric:: {panel}\n\n{''.join(entries)}" if entries else ""
        return self.parse_text_to_nodes(text)


def _entry(parameter: inspect.Parameter, kind: Any, info: Any) -> str:
    """An ``option`` of reStructuredText: names, what it takes, help and default."""
    while get_args(kind) and get_origin(kind) is not Literal:  # list[int] | None
        kind = get_args(kind)[0]
    choices = [member.value for member in kind] if issubclass_of(kind, Enum) else get_args(kind)
    named = isinstance(info, OptionInfo)
    # typer takes the first name for a default that is none, until it makes the command.
    names = [name for name in (info.default, *(info.param_decls or ())) if str(name)[:1] == "-"]
    names = names or ["--" + parameter.name.replace("_", "-")]
    value = "" if kind is bool else info.metavar or "|".join(choices) or parameter.name.upper()
    title = ", ".join(f"{name} {value}".strip() for name in names) if named else value
    default = getattr(parameter.default, "value", parameter.default)
    given = "" if default in (None, inspect.Parameter.empty) else f"  Default: ``{default}``."
    return f".. option:: {title}\n\n   {info.help}{given}\n\n"


def issubclass_of(kind: Any, base: type) -> bool:
    """Is it a class at all, and one of these?"""
    return isinstance(kind, type) and issubclass(kind, base)


def _tex_to_mathml(writer: Any, node: nodes.Node) -> None:
    block = isinstance(node, nodes.math_block)
    writer.body.append(latex2mathml.tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def _copy_results(app: Sphinx) -> None:
    """The reports of benchmarks/results as pages in docs/results, which git ignores."""
    pages = Path(app.srcdir) / "results"
    shutil.rmtree(pages, ignore_errors=True)
    names = sorted(path.relative_to(RESULTS) for path in RESULTS.glob("*/*.md"))
    for name in names:
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(RESULTS / name, pages / name)
    entries = "\n".join(f"{name.parent}: {name.stem} <{name.with_suffix('')}>" for name in names)
    about = (RESULTS / "README.md").read_text()
    (pages / "index.md").write_text(f"{about}\n```{{toctree}}\n:maxdepth: 1\n\n{entries}\n```\n")


def _link_results(app: Sphinx, page: str, source: list[str]) -> None:
    """Links into benchmarks/results, which a repository's viewer follows, to the pages above."""
    source[0] = source[0].replace("../benchmarks/results/", "results/")


def setup(app: Sphinx) -> None:
    """Add formulas as MathML, the options of the commands, and the pages of results."""
    app.connect("builder-inited", _copy_results)
    app.connect("source-read", _link_results)
    app.add_html_math_renderer("mathml", (_tex_to_mathml, None), (_tex_to_mathml, None))
    app.add_directive("command-options", CommandOptions)
