"""The linear model over the features of a prompt, and how it is trained."""
