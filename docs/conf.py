"""How Sphinx builds the site: `make docs`."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import sgdr_fused

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

# Every cross-reference must lead somewhere. Types that are not on these pages are named in
# signatures only: torch's, the standard library's and those of modules that are not public.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|typing|Optimizer|LRScheduler|Tensor|ParamsT)\b.*"),
    ("py:class", r"Anneal|Backend|sgdr_fused\.\w+\.\w+"),
]

_TORCH_PAGES = "https://docs.pytorch.org/docs/stable/generated/"


def find_missing(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.reference | None:
    """Leads ``:class:`torch.optim.SGD``` to torch's own pages, and ``:class:`FusedSGDR``` to where
    it is, whichever module says it.
    """
    target = node.get("reftarget", "")
    if node.get("reftype") == "class" and target.startswith("torch.optim."):
        return nodes.reference("", "", contnode, refuri=f"{_TORCH_PAGES}{target}.html")
    if node.get("refdomain") == "py" and target.partition(".")[0] in sgdr_fused.__all__:
        return env.domains["py"].resolve_xref(
            env,
            node["refdoc"],
            app.builder,
            node["reftype"],
            f"sgdr_fused.{target}",
            node,
            contnode,
        )
    return None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", find_missing)
