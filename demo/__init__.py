"""`make demo`: SpikeLM from a warm start to a GLUE-style score and a filled mask, on text that Python itself ships."""
