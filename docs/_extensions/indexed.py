"""Sphinx extension: below a heading, <!-- index: padding, ignore_index --> lists words by which the search finds it.

The search finds a section by its title only if the query is at least half as long. But it also searches the index, so
each word becomes an entry of the index that leads to this section. GitHub does not show comments.
"""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform

COMMENT = re.compile(r"<!--\s*index:(.*?)-->\s*", re.DOTALL)


class Entries(SphinxTransform):
    default_priority = 200

    def apply(self):
        for node in list(self.document.findall(nodes.raw)):
            if found := COMMENT.fullmatch(node.astext()):
                if not node.parent["ids"]:
                    page = self.document["source"]
                    raise ExtensionError(f"{page}: <!-- index: ... --> must stand alone, directly below a heading")
                section = node.parent["ids"][0]
                words = [" ".join(word.split()) for word in found[1].split(",")]
                node.replace_self(addnodes.index(entries=[("single", word, section, "main", None) for word in words]))


def setup(app):
    app.add_transform(Entries)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
