"""What measures, studies and predicts. This file lets the folder win over a package of its name in site-packages."""
