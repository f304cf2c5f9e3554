"""Names of modules and weights in the graphs of Dynamo, by identity."""
