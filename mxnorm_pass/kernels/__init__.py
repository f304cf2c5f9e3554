"""Triton kernels behind the ops. Imported only where they run; they know no graphs.

``coverage``                what the kernels do not do, and why
``launch``                  launch a kernel
``rows``                    what row kernels read and write, how they cut their work
``norm_cast``               rows: residual add, statistic, norm, cast along D, in any format
``norm_cast_both``          the same with the cast along T, for training
``device``                  device functions
"""
