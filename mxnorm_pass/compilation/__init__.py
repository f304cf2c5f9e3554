"""All that knows Dynamo, AOTAutograd, Inductor and torch.export.

``job`` is one call of the backend, ``inner`` compiles what the passes have made of it, ``names``
tells the modules of its nodes. ``explain``, ``export`` and ``layers`` are other ways in.
"""
