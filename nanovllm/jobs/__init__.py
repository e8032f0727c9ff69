"""Jobs: files of a million prompts, all GPUs of a machine, many machines, and nothing lost."""
