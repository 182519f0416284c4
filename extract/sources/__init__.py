"""From paths to clips: folders, lists, tars, zips."""
