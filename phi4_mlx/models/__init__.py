"""The models, one file each, and the parts they share."""
