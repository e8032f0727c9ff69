"""What trainers need of an engine: new weights in place, and its memory while they use the GPU."""
