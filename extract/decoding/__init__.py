"""From a clip to the frames of its windows."""
