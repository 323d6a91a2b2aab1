"""Pages of HTML: a diagnosis, and the record of a monitor."""
