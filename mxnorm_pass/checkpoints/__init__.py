"""What a model that was trained with RMSNorm needs: calibrate it, compare, reorder its channels."""
