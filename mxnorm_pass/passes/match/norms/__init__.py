"""What is an RMSNorm: found by what is computed, however it is spelled."""
