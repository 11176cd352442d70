"""What features go with: each other, token ids, and logits."""
