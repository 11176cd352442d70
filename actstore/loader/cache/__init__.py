"""The cache keeps shards of a remote store on a local disk."""
