"""Turn a matched norm into MXNorm. Never declines: what is legal was decided in ``match``.

``fusion`` edits one fusion in: its ``casts``, its ``gain``, its ``estimate`` and the residual add.
"""
