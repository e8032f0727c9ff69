"""What all parts share. Nothing here imports another part of the package."""
