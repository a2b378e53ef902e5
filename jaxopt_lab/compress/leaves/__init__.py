"""The compressed leaves, a file each: how a weight is stored, and what can be done to it as it is."""
