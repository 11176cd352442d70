"""Activation patching: what a model answers if values of one run are put into another.

`grid` patches every cell of a grid and gives a `PatchResult`. The functions of ``transformer_lens.patching`` are here
under their names. `attribution` estimates grids, and `edge_scores` edges between parts, in two forwards
and one backward pass.
`grid` patches every cell of a grid and gives a `PatchResult`, and so does `path_patch` for what parts of the model send
directly to others. The functions of ``transformer_lens.patching`` are here under their names.
`grid` patches every cell of a grid and gives a `PatchResult`, and so do `path_patch` for what parts of the model send
directly to others, and `ablate` for values that say nothing. `loss_recovered` measures an SAE in the place of a value,
and `steering` adds a direction to one. The functions of ``transformer_lens.patching`` are here under their names.
"""

from actstore.patching.ablation.ablate import ablate
from actstore.patching.estimates.attribution import attribution
from actstore.patching.estimates.edge_result import Edge, EdgeScores
from actstore.patching.estimates.edge_scores import edge_scores
from actstore.patching.estimates.estimate import Estimate
from actstore.patching.functions import (
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
from actstore.patching.grid import grid
from actstore.patching.loss_recovered import LossRecovered, loss_recovered
from actstore.patching.paths.direct_path import (
    get_act_patch_direct_path,
    get_act_patch_direct_path_all_sources,
)
from actstore.patching.paths.path_patch import path_patch
from actstore.patching.results.panels import Axis
from actstore.patching.results.result import PatchResult
from actstore.patching.steering import Steering, steering, steering_vector

__all__ = [
    "Axis",
    "Edge",
    "EdgeScores",
    "Estimate",
    "LossRecovered",
    "PatchResult",
    "Steering",
    "ablate",
    "attribution",
    "edge_scores",
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
    "steering",
    "steering_vector",
]
