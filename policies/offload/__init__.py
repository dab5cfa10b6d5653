"""Which cached prefix blocks get a copy in host memory, when, and for how long."""
