"""One file a claim. Each sets `CLAIM`; its name is the file's."""
