"""Activation patching: what a model answers if values of one run are put into another.

`grid` patches every cell of a grid and gives a `PatchResult`, and so do `path_patch` for what parts of the model send
directly to others, and `ablate` for values that say nothing. `attribution` estimates grids, and `edge_scores` edges
between parts, in two forwards and one backward pass. `loss_recovered` measures an SAE in the place of a value, and
`steering` adds a direction to one. `run_job` makes a grid for each of many pairs of prompts. The functions of
``transformer_lens.patching`` are here under their names.
"""

from actstore.patching.ablation.ablate import ablate
from actstore.patching.estimates.attribution import attribution
from actstore.patching.estimates.edge_result import Edge, EdgeScores
from actstore.patching.estimates.edge_scores import edge_scores
from actstore.patching.estimates.grid_estimate import Estimate
from actstore.patching.grid import grid
from actstore.patching.jobs.duration import JobEstimate, estimate_job
from actstore.patching.jobs.events import PartDone
from actstore.patching.jobs.job import PatchJob
from actstore.patching.jobs.planning import PlannedPatching, plan_job
from actstore.patching.jobs.report import PatchReport
from actstore.patching.jobs.run import run_job
from actstore.patching.loss_recovered import LossRecovered, loss_recovered
from actstore.patching.paths.direct_path import (
    get_act_patch_direct_path,
    get_act_patch_direct_path_all_sources,
)
from actstore.patching.paths.path_patch import path_patch
from actstore.patching.results.panels import Axis
from actstore.patching.results.result import PatchResult
from actstore.patching.steering import Steering, steering, steering_vector
from actstore.patching.transformer_lens_functions import (
    generic_activation_patch,
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_by_pos_every,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_out,
    get_act_patch_block_every,
    get_act_patch_mlp_out,
    get_act_patch_resid_mid,
    get_act_patch_resid_post,
    get_act_patch_resid_pre,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
    make_df_from_ranges,
)

__all__ = [
    "Axis",
    "Edge",
    "EdgeScores",
    "Estimate",
    "JobEstimate",
    "LossRecovered",
    "PartDone",
    "PatchJob",
    "PatchReport",
    "PatchResult",
    "PlannedPatching",
    "Steering",
    "ablate",
    "attribution",
    "edge_scores",
    "estimate_job",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_post",
    "get_act_patch_resid_pre",
    "grid",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "loss_recovered",
    "make_df_from_ranges",
    "path_patch",
    "plan_job",
    "run_job",
    "steering",
    "steering_vector",
]
