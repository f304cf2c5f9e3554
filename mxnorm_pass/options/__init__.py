"""The options of the backend: ``config`` holds them, ``validate`` checks, ``parse`` splits.

``calibration`` and ``channel_order`` are the value and the check of a calibrated model,
``inductor`` knows Inductor's own options.
"""
