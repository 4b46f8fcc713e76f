"""Blocks of which nothing is known beforehand: what one computes is recorded in a call of it, and the sites in it are fused.

tracing.py   the graph of what a block's own forward does between the modules it calls
sites.py     norms, modulations and gated residuals in that graph
program.py   the graph as source again, with ops in the place of sites
part.py      the fused forward, how it is proven, and which modules of a model are tried
exact.py     another one, with the bits of the original's
"""
