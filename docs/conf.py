"""How Sphinx builds these pages: `make docs`, into docs/_build/html."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "_extensions"))
from klcore import __version__

project = "klcore"
author = "The klcore developers"
copyright = "2026, the klcore developers"
version = release = __version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "docstrings",
    "indexed",
    "mathml",
    "pictures",
    "repository",
]
exclude_patterns = ["_build", "_extensions", "benchmarks"]
nitpicky = True
smartquotes = False  # types such as {"probs", "logits"} must paste

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # numpydoc's sections say what the types are
autodoc_mock_imports = ["torch"]  # which klcore.compat.trl and .liger import, and which is large
autosummary_generate = True
autosummary_ignore_module_all = False
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
templates_path = ["_templates"]

html_theme = "pydata_sphinx_theme"
html_title = "klcore"
html_static_path = ["_static"]
html_css_files = ["klcore.css"]
html_show_sourcelink = False
html_theme_options = {
    "github_url": "https://github.com/klcore/klcore",
    "header_links_before_dropdown": 4,
    "navbar_align": "left",
    "show_prev_next": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
