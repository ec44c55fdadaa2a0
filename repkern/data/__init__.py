"""Images for training: data sets, reading, augmentation, and batches by counter."""
