"""Cast a model's weights once, so that they take half the memory or a quarter.

``convert`` asks which linears have a weight that torchao can hold (``plan``), has torchao cast one
after the other (``formats``), says so where transformers saves the model (``saving``), and returns
what it did (``conversion``).
"""
