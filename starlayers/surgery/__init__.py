"""Turn the MLPs of existing models into star MLPs, and back."""

from starlayers.surgery.adapters import bind_adapter, gate_names, load_adapter
from starlayers.surgery.experts import StarExperts
from starlayers.surgery.find import find_mlps
from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.gates import gate_parameters, gate_sizes, reset_gates
from starlayers.surgery.loading import from_pretrained
from starlayers.surgery.merge import merge
from starlayers.surgery.param_groups import param_groups
from starlayers.surgery.projection import StarProjection
from starlayers.surgery.recipes import RECIPES, register_recipe
from starlayers.surgery.report import Report, report
from starlayers.surgery.saving import apply_record, record_of
from starlayers.surgery.sharing import save_with_code
from starlayers.surgery.site import Site
from starlayers.surgery.starify import revert, starify

__all__ = [
    "RECIPES",
    "GatedMLP",
    "Report",
    "Site",
    "StarExperts",
    "StarProjection",
    "apply_record",
    "bind_adapter",
    "find_mlps",
    "from_pretrained",
    "gate_names",
    "gate_parameters",
    "gate_sizes",
    "load_adapter",
    "merge",
    "param_groups",
    "record_of",
    "register_recipe",
    "report",
    "reset_gates",
    "revert",
    "save_with_code",
    "starify",
]
