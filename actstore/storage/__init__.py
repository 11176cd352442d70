"""Storage keeps bytes on disks, S3 or elsewhere behind one interface, and knows nothing of activations."""
