"""Sphinx extension: in docstrings, docs/maths.md is a link to that page.

Docstrings name the file, because help() shows them as they are: there, a path reads better than a role or a URL.
"""

import re


def link_pages(app, what, name, obj, options, lines):
    def link(path):
        return f":doc:`/{path[1]}`" if path[1] in app.env.found_docs else path[0]

    lines[:] = [re.sub(r"\bdocs/([\w/-]+)\.md\b", link, line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", link_pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
