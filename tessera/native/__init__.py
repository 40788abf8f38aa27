"""C++ and what is fast on one kind of machine, swapped in from outside a model."""
