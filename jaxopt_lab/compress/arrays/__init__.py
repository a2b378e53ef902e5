"""The mathematics of compression, on bare arrays: nothing here knows of leaves, trees or models."""
