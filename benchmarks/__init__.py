"""Speed and memory of this project beside the tutorials' method. See README.md."""
