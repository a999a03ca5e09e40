"""A run on several ranks: how they share the batch, the model and the decisions."""
