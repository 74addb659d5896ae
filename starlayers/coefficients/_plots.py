"""Optuna's figures of a study, as files, without a trace in matplotlib's settings."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlayers.coefficients.optional import needs

if TYPE_CHECKING:
    import optuna


def plot_study(study: "optuna.Study", folder: Path) -> list[Path]:
    """Write the figures that fit the study to `folder`, and return their files."""
    for module in ("optuna", "matplotlib", "sklearn"):  # importances need the last
        needs("SearchResult.plot", module)
    import matplotlib.pyplot as plt
    import numpy as np
    import optuna
    from matplotlib.ticker import NullFormatter
    from optuna.visualization import matplotlib as draw

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    figures: dict[str, Any] = {}
    if len(study.directions) > 1:
        if len(study.directions) <= 3:
            figures["front"] = draw.plot_pareto_front
    elif complete:
        figures["history"] = draw.plot_optimization_history
        figures["slice"] = draw.plot_slice
        figures["parallel"] = draw.plot_parallel_coordinate
        if len({t.value for t in complete}) > 1 and len(complete[0].params) > 1:
            figures["importances"] = draw.plot_param_importances
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, make in figures.items():
        # Optuna sets a style for the whole process
        with plt.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            axes = make(study)
            figure = np.ravel(axes)[0].figure
            if name == "parallel":
                figure.set_size_inches(2 + 1.2 * len(figure.axes), 5)
            for ax in figure.axes:
                for axis in (ax.xaxis, ax.yaxis):
                    axis.set_minor_formatter(NullFormatter())  # they would cover each other
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=120, bbox_inches="tight")
            plt.close(figure)
    return files
