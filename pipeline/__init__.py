"""The top floor: the commands, the stage graph and the quickstart's little world."""
