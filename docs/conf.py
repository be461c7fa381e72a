"""Sphinx settings of the site: `make docs`."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with Sphinx

sys.path.insert(0, str(Path(__file__).parent))

project = "sgdr_fused"
version = release = installed_version("sgdr_fused")
PYPROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
URLS = PYPROJECT["project"].get("urls", {})
html_title = f"sgdr_fused {version}"


def repository_link(urls: dict[str, str]) -> list[dict[str, str]]:
    """The footer's link to the repository, if it is one of the project's URLs."""
    return [
        {"name": name, "url": url, "html": name, "class": ""}
        for name, url in urls.items()
        if name == "Repository"
    ]


extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
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
html_theme_options = {"top_of_page_buttons": [], "footer_icons": repository_link(URLS)}
pygments_dark_style = "github-dark"

# Copy what is typed: not a prompt, not what a command prints.
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True
copybutton_selector = "div:not(.highlight-output) > div.highlight > pre"

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
