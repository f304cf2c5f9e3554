"""Triton kernels behind the ops. Imported only where they run; they know no graphs.

``coverage``                what the kernels do not do, and why
``launch``                  launch a kernel
``rows``                    what row kernels read and write, how they cut their work
``norm_cast``               rows: residual add, statistic, norm, cast along D, in any format
``norm_cast_both``          the same with the cast along T, for training
``operand_casts``           a matrix and its transpose as operands of a recipe's matmuls
``operand_absmax``          the largest element of such an operand, for NVFP4's tensor scale
``operand_read``, ``operands``  what is asked of an operand, and what that is to a kernel
``mx_linear``               few rows times a weight in MXFP8 or MXFP4
``device``                  device functions
"""
