"""Generated text: sampled continuations of prompts as a data set, of which activations can be extracted."""
