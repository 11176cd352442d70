"""Loading brings a Hugging Face model into memory: its configuration, weights, adapters and device."""
