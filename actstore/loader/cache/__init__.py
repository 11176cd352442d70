"""The cache keeps shards of a store elsewhere on a local disk."""
