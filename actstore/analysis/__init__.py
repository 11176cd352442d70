"""Analysis reads whole stores: it finds matching sequences, and measures how well an order mixes them."""
