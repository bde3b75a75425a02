"""The parts of the pages that are read off the registries and the results of benchmarks: they can't fall behind."""

import inspect
from pathlib import Path

import report  # of the benchmarks
from report import table
from result_file import Difference, read

from backpack import extensions
from backpack.curvature.losses import ROOTS
from backpack.nodes import FORMS

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


class Order:
    """The groups of the gallery, and in each what to read first; examples that are not listed follow, by name."""

    PAGES = {
        "first_steps": ("individual_gradients", "subsampling", "all_in_one"),
        "jobs": (
            "dp_sgd",
            "laplace",
            "influence",
            "data_attribution",
            "kfac_optimizer",
            "continual_learning",
            "gradient_noise",
            "pruning",
        ),
        "extending": ("custom_module", "extension_hook"),
    }

    def __init__(self, folder: str) -> None:
        self.first = self.PAGES.get(Path(folder).name, ())

    def __call__(self, file: str) -> tuple[int, str]:
        own = Path(file).stem
        return (self.first.index(own) if own in self.first else len(self.first)), own


def summary(thing: object) -> str:
    """The first sentence of a docstring, with its code marked as Markdown does."""
    first = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
    return first.replace("``", "`").replace("|", "\\|")


def forms() -> str:
    """The kinds of nodes that have a normal form, by family."""
    families: dict[str, list[str]] = {}
    for kind, form in FORMS.items():
        families.setdefault(form.__module__.rpartition(".")[2], []).append(f"`{kind}`")
    return table(["family", "kinds of nodes"], ([family, ", ".join(kinds)] for family, kinds in families.items()))


def losses() -> str:
    """The losses that have a rule."""
    families: dict[str, list[str]] = {}
    for loss, rule in ROOTS.items():
        families.setdefault(summary(inspect.getmodule(rule)), []).append(f"`{loss.__name__}`")
    rows = [[", ".join(members), family] for family, members in families.items()]
    return table(["loss", "its Hessian"], rows)


def quantities() -> str:
    """All extensions."""
    rows = []
    for name in extensions.__all__:
        extension = getattr(extensions, name)
        arguments = ", ".join(
            parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
            for parameter in inspect.signature(extension).parameters.values()
        )
        rows.append([f"[`{name}`](#backpack.extensions.{name})", f"`{arguments}`", summary(extension)])
    return table(["extension", "arguments", "what it computes"], sorted(rows))


def write(folder: Path) -> None:
    """All parts, for the pages that include them."""
    folder.mkdir(exist_ok=True)
    for part in (forms, losses, quantities):
        (folder / f"{part.__name__}.md").write_text(part())
    report.write(read(RESULTS / "costs.json"), folder)
    for name in ("transformers", "growth"):
        report.write(read(RESULTS / f"{name}.json"), folder / name)
    (folder / "benchmark_agreement.md").write_text(report.agreement(read(RESULTS / "agreement.json", Difference)))
