"""`klcore compare`: one report on the logits of two models. It starts in command.py."""
