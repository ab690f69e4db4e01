"""Sphinx configuration: `make docs` builds the site from README.md, docs/, bench/*.md and the docstrings.

The source folder is the repository's root, so a link between two files works on the site as it does on GitHub.
"""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from tlkernels import __version__

project = "tlkernels"
release = __version__
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "docs/**.md", "bench/*.md"]
exclude_patterns = [".*", "build", "dist", "runs"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_enable_extensions = ["dollarmath", "html_image"]
myst_fence_as_directive = ["math"]  # GitHub renders ```math too
myst_heading_anchors = 4

smartquotes_action = "De"  # dashes and ellipses; quotation marks stay, since "none" is a value
default_role = "code"  # docstrings put code between single backticks
autodoc_mock_imports = ["open_clip", "spmd_types", "timm", "torchtitan"]  # they need torchvision and another torch
autodoc_typehints = "none"  # the signature would be longer than the page is wide; Args: names what is accepted
autodoc_member_order = "bysource"
napoleon_custom_sections = ["Shape"]
add_module_names = False

html_theme = "furo"
html_title = f"tlkernels {release}"
html_extra_path = ["index.html"]
html_static_path = ["site.css"]
html_css_files = ["site.css"]
pygments_style = "friendly"  # the theme's own has one colour for both sides of a diff
toc_object_entries = False
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"

CONTENTS = """

```{toctree}
:hidden:
:caption: Losses
:glob:
docs/losses/*
docs/choosing
```

```{toctree}
:hidden:
:caption: In your trainer
:glob:
docs/hosts/hf
docs/hosts/*
```

```{toctree}
:hidden:
:caption: Use
docs/install
docs/training
docs/bench
docs/profile
docs/environment
docs/differences
docs/numerics
```

```{toctree}
:hidden:
:caption: Figures
:glob:
bench/*
docs/verification
CHANGELOG
```

```{toctree}
:hidden:
:caption: Development
docs/adding-a-loss
docs/adding-a-backend
docs/gpu-run
```
"""


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give the README the table of contents, which on GitHub it does not need."""
    if docname == root_doc:
        source[0] += CONTENTS


def visit_math(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers render without a script."""
    self.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the two functions above."""
    app.connect("source-read", add_contents)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
