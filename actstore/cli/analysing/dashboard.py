"""``actstore dashboard``: a folder of pages and tables of features."""

from typing import Any

import click
import numpy as np

from actstore.cli.options.feature_options import feature_options, given_features
from actstore.cli.options.output_options import json_option
from actstore.cli.options.scan_options import hook_option, scan_arguments, scan_options
from actstore.cli.showing.analysis_progress import AnalysisProgress
from actstore.cli.showing.json_document import print_json
from actstore.opening import open_store


@click.command("dashboard")
@hook_option
@feature_options
@click.option(
    "--model",
    help="Hub name or folder of a model, for the tokens whose logits features raise and lower most.",
)
@click.option(
    "-k",
    "k",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="Largest rows of each feature, one of each sequence.",
)
@click.option(
    "--intervals",
    type=click.IntRange(1, 64),
    default=16,
    show_default=True,
    help="Intervals of values above 0, a power of two.",
)
@click.option(
    "--samples", type=click.IntRange(0), default=5, show_default=True, help="Rows from each interval."
)
@click.option(
    "--before", type=click.IntRange(0), default=20, show_default=True, help="Tokens in front of each row."
)
@click.option(
    "--after", type=click.IntRange(0), default=10, show_default=True, help="Tokens behind each row."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Another one gives other samples."
)
@scan_options
@click.option(
    "--out",
    metavar="FOLDER",
    default="dashboard",
    show_default=True,
    help="Path or URL of a new folder, or of one to go on with.",
)
@json_option
def dashboard_command(
    url: str,
    hook: str,
    directions: str | None,
    neurons: slice | list[int] | None,
    sae: str | None,
    features: slice | list[int] | None,
    model: str | None,
    k: int,
    intervals: int,
    samples: int,
    before: int,
    after: int,
    seed: int,
    out: str,
    as_json: bool,
    **of_scan: Any,
) -> None:
    """Write pages and tables of what features of HOOK in the store at URL are active on.

    Open index.html of the folder in any browser; nothing is loaded from elsewhere. Run the same command again after
    any interruption: pages that are there are not made again.

    \b
    actstore dashboard runs/a --hook blocks.7.hook_resid_post --sae sae --features 0:1000 --out dashboard
    """
    from actstore.analysis.dashboards.dashboard import dashboard

    store = open_store(url)
    given = given_features(directions, neurons, sae, features, int(np.prod(store.array_of(hook).shape)))
    hooked = None
    if model is not None:
        from actstore.hooks.model import HookedModel

        hooked = HookedModel.from_pretrained(model, device="cpu")
    with AnalysisProgress(quiet=of_scan["quiet"]) as progress:
        made = dashboard(
            store,
            hook,
            given.of,
            given.chosen,
            out=out,
            model=hooked,
            k=k,
            n_intervals=intervals,
            n_samples=samples,
            before=before,
            after=after,
            seed=seed,
            on_page=progress.counting("writing pages", "wrote", "pages"),
            **scan_arguments(of_scan, progress.on_progress),
        )
    if as_json:
        print_json(vars(made) | {"index": made.index})
    else:
        click.echo(str(made))
