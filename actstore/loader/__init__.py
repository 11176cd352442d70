"""Training on the rows of a store: shuffled batches, in an order that is computed rather than kept."""
