"""The files of a model: where they are, which of them count, and what they mean."""
