"""Optimizers x seeds, paired and tuned alike: a table with confidence intervals and plots."""
