"""Device functions of the kernels.

``mean_square``  inverse RMS of a row
``mx``           absmaxes, E8M0 exponents, element casts
``rounding``     float conversions
``publish``      hand numbers on between programs
"""
