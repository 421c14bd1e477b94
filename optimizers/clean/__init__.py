"""Passes that leave less: constants computed, shapes known, no-ops and leftovers gone.

convert_opset.py              any opset from 7 to 23, all of a graph or nothing
freeze_defaults.py            weights out of the inputs
inline_functions.py           bodies of functions in the place of their calls
fold_constants.py             compute what depends on no input, within a budget of bytes
fold_slices_of_weights.py     a part of a weight becomes a weight of its own
merge_equal_nodes.py          what is computed twice, but for random draws
infer_shapes.py               a type and a shape for every value, by onnx
name_sizes.py                 equal sizes get equal names, beyond what onnx infers
simplify_shapes.py            shape arithmetic whose outcome is known
remove_no_ops.py              nodes that return what they were given
remove_nan_guards.py          guards against rows that no mask empties
simplify_mask_indexing.py     a mask gathered element by element is the mask
remove_true_masks.py          the half of a mask that is always true
slice_tables.py               the first rows of a table, gathered one by one
unflatten_softmax.py          Softmax over the last axis, without a matrix around it
unfold_gemm.py                Reshape, Gemm, Reshape is MatMul and Add
split_packed.py               queries, keys, values gathered from one projection
split_projections.py          one projection for each of them
merge_mask_branches.py        an Attention that is there with and without its mask
merge_views.py                chains of Reshape and Transpose in their shortest form
sink_transposes.py            whole regions in the layout that needs fewest Transposes
simplify_with_onnxsim.py      onnxsim in a process of its own, on request

contents.py, facts.py, sizes.py        what is known of sizes, and of integers made of them
factors.py, regions.py, weight_views.py    what views do to sizes; who shares a layout
padding.py                             whether a mask hides anything
iota.py                                reading 0, 1, 2, ...
"""
