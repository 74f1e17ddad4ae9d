"""What run_mlm.py and run_glue.py share: arguments and recipes, loading a model, the record of a run, publishing."""
