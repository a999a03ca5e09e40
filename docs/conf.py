"""Sphinx configuration: ``make docs``."""

from __future__ import annotations

from olmo_core import __version__

project = "olmo-attention"
author = "the olmo-attention contributors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"olmo-attention {__version__}"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_inherit_docstrings = True
myst_heading_anchors = 3
# README links to files of the repository, which are not pages here.
suppress_warnings = ["myst.xref_missing"]
