"""The site: ``make docs``, or ``python -m sphinx -W docs results/docs``."""

import nest_fast

project = "nest_fast"
author = "the nest_fast authors"
release = nest_fast.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "notes"]
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and dtypes
html_theme = "furo"
html_title = f"nest_fast {release}"
html_theme_options = {"sidebar_hide_name": False}
