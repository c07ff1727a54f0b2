"""Sphinx configuration. Pages are Markdown (MyST); notebooks are executed at build; a warning is an error."""

from __future__ import annotations

import re
import sys
from pathlib import Path

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
