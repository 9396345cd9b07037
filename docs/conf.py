"""How Sphinx builds these pages: `sphinx-build -W -n docs docs/_build`."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "dmcp"
author = "the authors of dmcp"
release = version = installed("dmcp")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "commands",
    "formulas",
    "measured",
    "references",
]
exclude_patterns = ["_build"]
nitpicky = True

# Markdown
myst_enable_extensions = ["attrs_block", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = True

# Docstrings: single backticks name an object of the package, or else some code (`references`).
default_role = "named"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"
add_module_names = False

# What other projects document; looking it up would take the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|collections|contextlib|pathlib|types|typing|enum|numpy|click|fx)\..*"),
    (r"py:.*", r"Tensor|Path|Figure"),
]

# Pages
smartquotes = False
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"dmcp {release}"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["dmcp.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
