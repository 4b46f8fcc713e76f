"""What builds, finishes and proves the kernels. This file lets the folder win over a package of its name in site-packages."""
