"""One command on many devices and machines: a driver, and an actor a device."""
