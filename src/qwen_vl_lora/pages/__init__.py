"""How HTML pages are made: one file each, with its own style and script, that asks nothing of a network."""
