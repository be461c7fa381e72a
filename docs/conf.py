"""Sphinx settings of the site: `make docs`."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

project = "sgdr_fused"
version = release = installed_version("sgdr_fused")
html_title = f"sgdr_fused {version}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "mathml",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}
pygments_dark_style = "github-dark"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True
napoleon_use_rtype = False

# A broken cross-reference is an error, except to types of torch and of the standard library.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|os|collections|typing|Axes|Optimizer|Tensor|ParamsT|Anneal|Backend)\b.*")
]

_TORCH_PAGES = "https://docs.pytorch.org/docs/stable/generated/"


def link_to_torch(
    app: Sphinx, env: object, node: pending_xref, contnode: nodes.TextElement
) -> nodes.reference | None:
    """Links ``:class:`torch.optim.SGD``` and similar references to torch's own pages."""
    target = node.get("reftarget", "")
    if node.get("reftype") != "class" or not target.startswith("torch.optim."):
        return None
    return nodes.reference("", "", contnode, refuri=f"{_TORCH_PAGES}{target}.html")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", link_to_torch)
