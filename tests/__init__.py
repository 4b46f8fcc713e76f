"""The test suite. This file lets the folder win over a package of its name in site-packages, such as torch-fidelity's."""
