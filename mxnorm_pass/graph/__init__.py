"""What the passes ask of FX graphs and how they edit them; knows no norm and no cast.

``nodes``, ``constants``, ``matmul``, ``modules``, ``weights`` and ``inputs`` ask; ``build``,
``trace`` and ``fake`` add nodes, ``cleanup`` removes them; ``code`` and ``source_line`` print.
"""
