"""Sphinx extension: what is written for GitHub's view of the repository works on the site as well.

A link to a file or folder that is no page, as ../examples/torch_distill.py, goes to GitHub. A picture NAME-light.svg is
NAME-dark.svg in the dark theme.
"""

from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[2]
GITHUB = "https://github.com/klcore/klcore/blob/main/"


class Links(SphinxTransform):
    default_priority = 200  # before Sphinx collects downloads and images

    def apply(self):
        for node in list(self.document.findall(addnodes.download_reference)) + [
            node for node in self.document.findall(addnodes.pending_xref) if node.get("reftype") == "myst"
        ]:
            path = Path(self.env.relfn2path(node["reftarget"].partition("#")[0], node["refdoc"])[1]).resolve()
            if path.exists() and path.is_relative_to(ROOT) and not self.env.path2doc(str(path)):
                uri = GITHUB + path.relative_to(ROOT).as_posix()
                node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=False))


class Pictures(SphinxTransform):
    default_priority = 200

    def apply(self):
        for node in list(self.document.findall(nodes.image)):
            dark = node["uri"].replace("-light.svg", "-dark.svg")
            if dark != node["uri"]:
                twin = node.deepcopy()
                twin["uri"] = dark
                twin["classes"] += ["only-dark"]
                node["classes"] += ["only-light"]
                node.parent.insert(node.parent.index(node) + 1, twin)


def setup(app):
    app.add_transform(Links)
    app.add_transform(Pictures)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
