"""Sphinx extension: <picture>, by which GitHub chooses between light and dark, as pydata's theme does.

Sphinx leaves HTML in Markdown alone: it would not copy the files, nor follow the theme's switch. So each <picture>
becomes two images, of which the theme shows one.
"""

import json
import re

PICTURE = re.compile(r'<picture>\s*<source [^>]*srcset="([^"]*)">\s*<img src="([^"]*)"\s+alt="([^"]*)">\s*</picture>')


def two_images(picture):
    dark, light, alt = picture.groups()
    words = json.dumps(" ".join(alt.split()))
    return "\n".join(
        f"```{{image}} {path}\n:class: only-{kind}\n:alt: {words}\n```"
        for kind, path in (("light", light), ("dark", dark))
    )


def replace_pictures(app, docname, source):
    source[0] = PICTURE.sub(two_images, source[0])
    if "<picture>" in source[0]:
        raise ValueError(
            f'{docname}: write <picture> <source media="..." srcset="..."> <img src="..." alt="..."> </picture>'
        )


def setup(app):
    app.connect("source-read", replace_pictures)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
