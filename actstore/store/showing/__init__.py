"""What objects of a store look like in notebooks."""
