"""Read-only matching: a graph in, one fusion or one reason per norm out.

``norms`` finds the norms, ``casts`` the MX casts, ``linears`` who multiplies them;
``residual_add`` and ``transposed_cast`` what a fused op can do besides. ``decide`` puts them
together into a ``fusion`` or a refusal with its ``skip``; ``parts`` says what belongs to each.
"""
