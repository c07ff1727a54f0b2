"""Sphinx configuration. Pages are Markdown (MyST); notebooks are executed at build; a warning is an error."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import _generate  # noqa: E402  (found through the line above)

project = "lowvar"
author = "The lowvar authors"
project_copyright = author
_source = (ROOT / "src/lowvar/__init__.py").read_text()
_version = re.search(r'^__version__ = "(.+)"$', _source, re.MULTILINE)
assert _version is not None, "src/lowvar/__init__.py states no __version__"
version = release = _version.group(1)

extensions = ["myst_nb", "sphinx.ext.mathjax"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# A tutorial that fails stops the build. Results are kept between builds and never committed.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build/jupyter_cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 300

# Included by other pages, not pages of their own.
exclude_patterns = ["_build", "_generated/cli.md", "_generated/api_toc.md", "results/*.md", "progress/*.md"]
nitpicky = False
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"lowvar {release}"
html_copy_source = False
html_show_sphinx = False

_generate.write(HERE / "_generated", ROOT / "src")


@functools.cache
def _imports(module: str) -> dict[str, str]:
    """Where a module has its names from, {name: module}."""
    place = ROOT / "src" / Path(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    tree = ast.parse(file.read_text()) if file.is_file() else ast.Module([], [])
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module or "" for node in found for alias in node.names}


class ImportedNames(PythonDomain):
    """A bare name that two modules have is the one that the module it stands in imports."""

    def find_obj(
        self,
        env: Any,
        modname: Any,
        classname: Any,
        name: Any,
        type: Any,  # noqa: A002 (Sphinx's name)
        searchmode: int = 0,
    ) -> list[Any]:
        """See the base class."""
        found = super().find_obj(env, modname, classname, name, type, searchmode)
        if len(found) < 2 or not modname:
            return found
        source = _imports(modname).get(name, modname)
        own = [entry for entry in found if entry[0].startswith(f"{source}.")]
        return own if len(own) == 1 else found


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.add_domain(ImportedNames, override=True)
