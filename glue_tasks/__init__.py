"""The GLUE tasks: what they are, how their files are read, and how their results are shown and submitted."""
