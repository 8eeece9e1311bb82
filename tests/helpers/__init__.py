"""What tests of several files share; pytest puts `tests/` on the path."""
