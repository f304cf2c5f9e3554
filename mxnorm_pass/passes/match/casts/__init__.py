"""What is an MX cast: found by evaluation; ops that show no inside are known by name."""
