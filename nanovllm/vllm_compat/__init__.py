"""What scripts written for vLLM expect: its options and methods, and what is absent here."""
