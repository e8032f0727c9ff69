"""Programs that use the engine; each is read and run on its own."""
