"""Training from a store: shuffled batches of rows, in an order that is computed rather than kept."""
