"""`klcore compare`: two files of logits, one report. command.py is the way in."""
