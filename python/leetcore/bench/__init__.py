"""What stands behind `leetcore check`, `bench`, `plot` and `tune`."""
