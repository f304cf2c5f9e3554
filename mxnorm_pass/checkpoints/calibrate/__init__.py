"""Fit the estimate to a model that was trained with RMSNorm.

``calibrate`` asks the pass which norms it would fuse (``norms``), runs the model with their linears
on MX casts (``emulation``), gathers what the fit needs (``moments``), chooses a channel order
(``orders``) and block weights (``fit``), and returns to the exact RMS where the loss asks for it
(``fallback``).
"""
