"""What happens to the graph of Dynamo before autograd differentiates it.

``regions`` and ``scopes`` know the bodies in it, ``provenance`` marks its nodes, ``plan`` decides
on its norms with ``derivatives`` and ``substitution``, ``substitute`` edits the estimates in.
"""
