"""The quickstart's little world: simulation, files, backbone."""
