"""The linear model over the features of a prompt, and its training."""
