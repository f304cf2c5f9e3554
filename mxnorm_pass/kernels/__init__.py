"""Triton kernels behind the ops. Imported only where they run; they know no graphs.

``coverage``                what the kernels do not do, and why
``launch``, ``launch_both``  allocate results, pick a configuration, launch
``norm_cast``               rows: residual add, statistic, norm, cast along D
``norm_cast_both``          the same with the cast along T, for training
``statistic``, ``mx``       device functions: inverse RMS; absmaxes, E8M0 exponents, element casts
``publish``, ``rounding``   device functions: hand numbers on between programs; float conversions
"""
