"""What the training scripts share: arguments and recipes, loading a model, a run and its record, publishing."""
