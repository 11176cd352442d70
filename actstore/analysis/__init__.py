"""Analysis reads whole stores to find something out: sequences that match, how well an order mixes."""
