"""What accelerate() knows of diffusers.

dit.py       DiTTransformer2DModel by its structure, and copies of it: the residual stays open between its blocks
block.py     parts of the other models, known by their class: how they are called, proven and found again
norms.py     the norms these models share
joint.py     blocks of two streams with joint attention
parallel.py  parallel blocks, and other blocks of one stream beside those
cross.py     blocks of one stream with cross-attention
others.py    blocks of other forms
table.py     which of these stands for which class
"""
