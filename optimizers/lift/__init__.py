"""Passes that raise decomposed forms to the ops that mean them, whoever exported the graph.

walk.py                         the loop that they share: read from an anchor, write or explain
lift_gelu.py                    erf, tanh and sigmoid forms                 -> Gelu
lift_layer_normalization.py     mean, variance, root                        -> LayerNormalization
lift_rms_normalization.py       the same without a mean                     -> RMSNormalization
lift_rotary_embedding.py        halves or pairs, partial                    -> RotaryEmbedding
lift_attention.py               scores (scores.py), Softmax, values         -> Attention
share_key_heads.py              GQA and MQA: heads repeated for groups of queries
merge_attention_heads.py        Attention splits and joins the heads itself
drop_key_bias.py                a bias that softmax does not see
fold_value_bias.py              a bias that passes through

columns.py, rotary_cache.py     reading a rotation column by column; the caches it needs
"""
