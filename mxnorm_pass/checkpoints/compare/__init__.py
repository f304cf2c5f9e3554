"""Run a model as it is, with exact RMS on MX casts, and as a config has it.

``compare`` compiles the model through the backend, with an interpreter that watches the fused ops
(``watch``), and says where the losses come from (``comparison``).
"""
