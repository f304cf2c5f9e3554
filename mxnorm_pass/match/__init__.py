"""Read-only matching: a graph in, one fusion or one reason per norm out.

``norm`` finds the norms, ``cast`` the MX casts, ``linear`` who multiplies them, ``backward`` the
norm's VJP; ``site`` puts them together. All that decides whether a norm is rewritten is here.
"""

from mxnorm_pass.match.site import FusedCast, Fusion, Obstacle, Refusal, find_sites

__all__ = ["FusedCast", "Fusion", "Obstacle", "Refusal", "find_sites"]
