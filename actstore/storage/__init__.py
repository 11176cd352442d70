"""Storage keeps bytes on disks, S3 or elsewhere behind one interface, and knows nothing of activations.

To add a storage, write a class as `blobs` says, choose it by its scheme in `opening`, and test it with
`actstore.testing.blobs`. Everything that fsspec reaches works already.
"""
