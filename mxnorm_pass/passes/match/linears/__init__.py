"""Who reads a norm or a cast: linears, plain or on casts, and what is neither."""
