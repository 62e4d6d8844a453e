"""The terms as published, for reproduction."""
