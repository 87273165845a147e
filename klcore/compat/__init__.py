"""The KL losses of five systems, rebuilt: a module each, with the names, arguments and numbers of the original."""
