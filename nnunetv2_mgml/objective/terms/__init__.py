"""The loss terms, one a file; importing this package registers them."""
