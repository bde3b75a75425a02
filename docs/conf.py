"""How Sphinx builds the pages: ``make docs``, offline."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]
import tables  # noqa: E402

project = "BackPACK"
author = copyright = "The BackPACK 2 contributors"
release = version = installed("backpack-for-pytorch")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "generated", "gallery/**.ipynb", "gallery/**.py", "gallery/**.md5"]
html_theme = "furo"
html_title = project
html_static_path, html_css_files = ["style.css"], ["style.css"]
html_show_sourcelink = False
html_show_sphinx = False
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "friendly", "monokai"
myst_enable_extensions = ["dollarmath", "substitution"]
myst_substitutions = {"release": release}
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 60
napoleon_use_rtype = False
suppress_warnings = ["config.cache"]  # sphinx-gallery's settings hold an object

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "subsection_order": [f"../examples/{group}" for group in tables.Order.PAGES],
    "nested_sections": False,
    "filename_pattern": r"\.py$",
    "within_subsection_order": "tables.Order",
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "image_scrapers": ("matplotlib",),
    "image_srcset": ["2x"],
    "abort_on_example_error": False,
    "default_thumb_file": str(HERE / "idea.svg"),
}


def setup(app: Sphinx) -> None:
    """Formulas as MathML, which browsers show without a script; tables from the registries and the benchmarks."""

    def inline(writer, node) -> None:
        writer.body.append(tex2mathml(node.astext()))
        raise SkipNode

    def block(writer, node) -> None:
        writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
        raise SkipNode

    from docutils.nodes import SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("builder-inited", lambda app: tables.write(HERE / "generated"))
