"""The catalog knows which stores a server gives, and which of their files clients may read."""
