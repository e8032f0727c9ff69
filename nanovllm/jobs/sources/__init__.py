"""Where the lines of a job come from: files, compressed or not, pipes, tables, directories."""
