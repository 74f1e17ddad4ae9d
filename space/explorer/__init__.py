"""What the page shows: a checkpoint, what it does with a text, and figures of that."""
