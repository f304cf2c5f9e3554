"""What the pass says of a graph, as data, text and page. Knows nothing of how norms are matched.

``site`` and ``reason`` are the data, ``report`` collects them, ``table``, ``page`` and ``diff``
show them. ``snapshot`` keeps a graph as it stood; ``site_graphs`` and ``traffic`` read each norm's
part of it off two snapshots. ``recording`` hands reports on, ``announce`` logs and warns.
"""
