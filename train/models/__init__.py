"""The networks: tokenizer, predictors and task heads, as plain torch modules.

    configs.py     the frozen configurations of the tokenizer and the two predictors
    rope.py        rotary positions: 2-D over a patch grid, and over seconds (and x, y)
    blocks.py      the tokenizer's self-attention block and the predictor's cross-attention block
    deltatok.py    DeltaTok, the tokenizer: two frames' patch tokens <-> one delta token
    predictor.py   the cross-attention predictor that both world models share
    deltaworld.py  DeltaWorld: past delta tokens -> the next delta token
    dinoworld.py   DINOWorld, the baseline: past patch tokens -> the next frame's patch tokens
    heads.py       linear segmentation and depth heads on patch tokens
    rgb_head.py    a decoder from patch tokens to pictures

Parameter names are those of the released checkpoints. Import from the modules themselves.
"""
