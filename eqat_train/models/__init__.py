"""Models by name: fetched, built without their weights, and filled a module at a time."""
