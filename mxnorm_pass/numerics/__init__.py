"""The one definition of the math, eager: graphs and kernels are traced from it or tested on it.

``formats`` names the block formats, ``e8m0`` and ``cast`` cast to them, ``rms`` estimates, ``norm``
normalises, ``norm_cast`` does both at once, ``layout`` arranges scales. ``recipe`` says in what a
linear's three matmuls read their operands, ``parse_recipe`` reads that from what users write,
``matmul`` casts and multiplies, ``linear`` is all three; ``hadamard`` transforms, ``stochastic``
rounds at random, ``philox`` draws.
Sources: McLean et al. 2026, "MXNorm", arXiv 2603.13180; OCP Microscaling specification v1.0; those
of the recipes are named there.

Shapes: ``T`` rows of ``D`` elements, cut into ``K = D / block_size`` blocks of ``B`` elements.
Leading dimensions are free; blocks lie along the last one.
"""
