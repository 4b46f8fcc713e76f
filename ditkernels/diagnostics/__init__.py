"""What tells whether and how this library works on a machine: parity, the choice of backends, costs."""
