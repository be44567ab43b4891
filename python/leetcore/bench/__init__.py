"""The commands `leetcore check`, `bench`, `plot` and `tune`, and the parts that all measurements
share."""
