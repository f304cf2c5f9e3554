"""Read-only matching: a graph in, one fusion or one reason per norm out.

``norm`` finds the norms, ``cast`` the MX casts, ``linear`` who multiplies them; ``site`` puts them
together. ``substitution`` finds a fusion in the graph that autograd is yet to differentiate. All
that decides whether a norm is rewritten is here.
"""

from mxnorm_pass.match.site import FusedCast, Fusion, Obstacle, Refusal, find_sites

__all__ = ["FusedCast", "Fusion", "Obstacle", "Refusal", "find_sites"]
