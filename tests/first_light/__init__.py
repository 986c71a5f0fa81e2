"""``make first-light``: what whoever has a GPU for ten minutes runs, and a report that can be attached to an issue."""
