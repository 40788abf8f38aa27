"""What is fast on one kind of machine, and C++ and how it is built: optional, swapped into a model from outside."""
