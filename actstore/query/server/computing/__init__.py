"""Computing what a store lacks, for clients that ask for it: a process that holds the model."""
