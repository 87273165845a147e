"""The native sources, installed as klcore._src: the CUDA backend compiles them at run time."""
