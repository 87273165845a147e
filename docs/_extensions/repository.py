"""Sphinx extension: links to files and folders that are no pages, as ../examples/torch_distill.py, go to GitHub."""

from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[2]
GITHUB = "https://github.com/klcore/klcore/blob/main/"


class Links(SphinxTransform):
    default_priority = 200  # before Sphinx collects downloads

    def apply(self):
        for node in list(self.document.findall(addnodes.download_reference)) + [
            node for node in self.document.findall(addnodes.pending_xref) if node.get("reftype") == "myst"
        ]:
            path = Path(self.env.relfn2path(node["reftarget"].partition("#")[0], node["refdoc"])[1]).resolve()
            if path.exists() and path.is_relative_to(ROOT) and not self.env.path2doc(str(path)):
                uri = GITHUB + path.relative_to(ROOT).as_posix()
                node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=False))


def setup(app):
    app.add_transform(Links)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
