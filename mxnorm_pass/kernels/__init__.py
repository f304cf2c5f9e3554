"""Triton kernels behind the ops. Imported only where they run; they know no graphs.

``launch``           allocates results, picks a configuration, launches; ``uncovered`` says what
                     the kernels do not do
``launch_both``      the same for casts in both directions
``norm_cast``        rows: statistic, norm, cast along D
``norm_cast_both``   the same with the cast along T, for training
``publish``          device functions: hand numbers on to another program
``mx``               device functions: block absmax, E8M0 exponents, element casts
``rounding``         device functions: float conversions that the interpreter gets right, too
"""
