"""Many runs: comparisons of optimizers, classification, searches for hyperparameters."""
