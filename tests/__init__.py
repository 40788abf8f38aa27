"""A regular package: torch-fidelity installs one named `tests` too, which would win over a folder without this file."""
