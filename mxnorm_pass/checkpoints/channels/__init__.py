"""Permute the channels of the residual stream: ``dims`` follows them through a graph."""
