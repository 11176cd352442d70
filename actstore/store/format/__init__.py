"""The format says what a store holds, down to the last byte: plan, layout, shards, documents."""
