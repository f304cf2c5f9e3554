"""Device functions of the kernels.

``mean_square``  inverse RMS of a row
``cast``         blocks over their scales, and back
``elements``     rounding to elements, elements in bytes
``mx``           absmaxes, E8M0 scales, their 128x4 layout
``nvfp4``        NVFP4's scales
``rounding``     float conversions
``operand``      a tile of a recipe's operand
``hadamard``     its transform
``noise``        random numbers
``publish``      hand numbers on between programs
"""
