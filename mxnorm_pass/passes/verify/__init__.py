"""The oracle: is a rewritten graph right, in float64?"""
