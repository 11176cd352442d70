"""The format of a store, down to the last byte: plan, layout, shards and documents."""
